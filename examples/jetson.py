"""On a Jetson, or any other device: which backends work, and how long a training step takes on each.

``lora-edge check`` tests every op of every backend first; ``lora-edge bench`` times every op layer by layer.
"""

import time

import torch

import lora_edge
from lora_edge.har.models import TResNet

BATCH, STEPS = 8, 3
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
states = lora_edge.backends()
for backend, state in states.items():
    print(f"{backend:8s} {state}")


def step_milliseconds(model: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> float:
    """Median of a few training steps after one that warms up; the device has finished when a step ends."""
    x, y = torch.randn(BATCH, 6, 100, device=device), torch.randint(7, (BATCH,), device=device)
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    seconds = []
    for _ in range(1 + STEPS):
        begin = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * sorted(seconds[1:])[STEPS // 2]


torch.manual_seed(0)
full = TResNet(in_channels=6, num_classes=7).to(device).train()
print(f"full fine-tuning on {device}: {step_milliseconds(full, list(full.parameters())):.1f} ms")
for backend in ("cpu", "cuda", "triton", "torch"):
    runs_here = backend == "torch" or (backend == "cpu") == (device.type == "cpu")
    if states[backend] != "available" or not runs_here:
        continue
    model = lora_edge.adapt(TResNet(in_channels=6, num_classes=7).to(device).train(), rank=2)
    with lora_edge.ops.use_backend(backend):
        taken = step_milliseconds(model, list(lora_edge.trainable_parameters(model)))
    print(f"lora_edge, {backend}: {taken:.1f} ms")
