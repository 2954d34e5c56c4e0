"""Merge, then export: the merged model is the stock architecture, so an exporter that accepts the base accepts it."""

import importlib.util

import torch

import lora_edge
from lora_edge.har.models import TResNet

torch.manual_seed(0)
model = TResNet(in_channels=6, num_classes=7).eval()
x, y = torch.randn(8, 6, 100), torch.randint(7, (8,))
kinds = [type(module) for module in model.modules()]

lora_edge.adapt(model, rank=2)
optimizer = torch.optim.Adam(lora_edge.trainable_parameters(model), lr=2e-2)
torch.nn.functional.cross_entropy(model(x), y).backward()
optimizer.step()
with torch.no_grad():
    adapted = model(x)
lora_edge.merge(model)
assert [type(module) for module in model.modules()] == kinds  # no trace of lora_edge
with torch.no_grad():
    assert torch.allclose(model(x), adapted, atol=1e-5)

program = torch.export.export(model, (x,))
torch.export.save(program, "merged.pt2")
assert torch.allclose(torch.export.load("merged.pt2").module()(x), adapted, atol=1e-5)
print("merged.pt2 written")

if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript"):
    torch.onnx.export(model, (x,), "merged.onnx", dynamo=True)
    print("merged.onnx written")
