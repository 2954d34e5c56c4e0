"""One base model for many people: an adapter file each, and switching between them without touching the frozen weights."""

import copy
from pathlib import Path

import torch

import lora_edge
from lora_edge.har.models import TResNet

torch.manual_seed(0)
base = TResNet(in_channels=6, num_classes=4).eval()
people = {name: (torch.randn(16, 6, 50), torch.randint(4, (16,))) for name in ("ada", "ben", "eve")}

# Train: the cores start at zero for each person, everything else is shared.
model = lora_edge.adapt(copy.deepcopy(base), rank=2)
cores: dict[str, dict[str, torch.Tensor]] = {}
for name, (x, y) in people.items():
    with torch.no_grad():
        for parameter in lora_edge.trainable_parameters(model):
            parameter.zero_()
    optimizer = torch.optim.Adam(lora_edge.trainable_parameters(model), lr=2e-2)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    lora_edge.save_adapter(model, f"{name}.safetensors")
    cores[name] = {key: value.clone() for key, value in model.state_dict().items() if key.endswith(".core")}
    print(f"{name}: {Path(f'{name}.safetensors').stat().st_size / 1e3:.0f} kB on disk")

# Switch: a person's cores take the place of another's.
x = torch.randn(4, 6, 50)
outputs = {}
for name in people:
    model.load_state_dict(cores[name], strict=False)
    with torch.no_grad():
        outputs[name] = model(x)
assert not torch.allclose(outputs["ada"], outputs["ben"])

# The same from the file, on any machine that has the base; another base is refused.
restored = lora_edge.load_adapter(copy.deepcopy(base), "eve.safetensors")
with torch.no_grad():
    assert torch.allclose(restored(x), outputs["eve"], atol=1e-5)
    with lora_edge.disabled(model):
        assert torch.equal(model(x), base(x))
try:
    lora_edge.load_adapter(TResNet(in_channels=6, num_classes=4), "eve.safetensors")
except ValueError as error:
    print(f"another base: {error}")
