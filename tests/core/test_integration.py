"""The rest of torch: autocast, torch.compile, DistributedDataParallel, export, ONNX, memory formats, CUDA. About 30 s."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import lora_edge
from helpers.networks import BUILD, network, train
from lora_edge.surgery.adapted import adapted_layers

NAMES = list(BUILD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_gives_the_stock_output_and_gradients_close_to_float32(name, dtype):
    model, x = network(name)
    base = copy.deepcopy(model)
    lora_edge.adapt(model, 2)
    with torch.autocast("cpu", dtype):
        y, want = model(x), base(x)
    assert y.dtype == want.dtype
    assert torch.equal(y, want)
    for layer in adapted_layers(model).values():
        with torch.autocast("cpu", dtype):
            part = torch.randn(2, layer.in_channels, *[9] * (layer.weight.dim() - 2))
            assert layer(part).dtype == layer.stock.forward(layer, part).dtype == dtype
    with torch.autocast("cpu", dtype):
        loss = model(x).float().square().sum()
    got = torch.autograd.grad(loss, list(lora_edge.trainable_parameters(model)))
    want = torch.autograd.grad(model(x).square().sum(), list(lora_edge.trainable_parameters(model)))
    for g, w in zip(got, want, strict=True):
        assert float((g - w).norm() / w.norm()) < 0.1


def test_autocast_leaves_float64_alone():
    model, x = network("1-D")
    lora_edge.adapt(model.double(), 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_compile_without_graph_breaks(name):
    model, x = network(name)
    lora_edge.adapt(model, 2)
    with torch.no_grad():
        for parameter in lora_edge.trainable_parameters(model):
            parameter.normal_(std=0.1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = x.requires_grad_()
    inputs = [x, *lora_edge.trainable_parameters(model)]
    got_y, want_y = compiled(x), model(x)
    torch.testing.assert_close(got_y, want_y)
    got, want = (torch.autograd.grad(y.square().sum(), inputs) for y in (got_y, want_y))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_compile_with_inductor():
    model, x = network("1-D")
    lora_edge.adapt(model, 2)
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    assert model[0].core.grad is not None
    lora_edge.merge(compiled)  # adapt finds the model inside the wrapper
    assert type(model[0]) is nn.Conv1d


def _ddp(rank: int, port: str, results) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model, _ = network("2-D")
    lora_edge.adapt(model, 2)
    ddp = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 10)[4 * rank : 4 * rank + 4]
    ddp.train()(x).square().mean().backward()
    results[rank] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [id(p) for p in lora_edge.trainable_parameters(ddp)] == [id(p) for p in lora_edge.trainable_parameters(model)]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_ddp, (port, results), nprocs=2)
        first, second = results[0], results[1]
    model, _ = network("2-D")
    lora_edge.adapt(model, 2)
    torch.manual_seed(0)
    model.train()(torch.randn(8, 3, 12, 10)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], parameter.grad)


def test_export_after_merge():
    model, x = network("2-D")
    lora_edge.adapt(model, 2)
    train(model, x, list(lora_edge.trainable_parameters(model)))
    lora_edge.merge(model).eval()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_onnx_after_merge(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model, x = network("1-D")
    lora_edge.adapt(model, 2)
    train(model, x, list(lora_edge.trainable_parameters(model)))
    lora_edge.merge(model).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, external_data=False)
    onnx.checker.check_model(onnx.load(path))
    evaluator = ReferenceEvaluator(str(path))
    (got,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_channels_last_model():
    model, x = network("2-D")
    lora_edge.adapt(model, 2)
    want = model(x)
    model = model.to(memory_format=torch.channels_last)
    got = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_cuda_device(name):
    model, x = network(name)
    base = copy.deepcopy(model)
    lora_edge.adapt(model, 2).cuda()
    train(model, x.cuda(), list(lora_edge.trainable_parameters(model)))
    y = model.eval()(x.cuda())
    with lora_edge.disabled(model):
        assert torch.equal(model(x.cuda()), base.cuda()(x.cuda()))
    torch.testing.assert_close(lora_edge.merge(model)(x.cuda()), y, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_cuda_graph_captures_a_training_step(backend):
    x, weight, core, suffix = (
        torch.randn(*shape, device="cuda") for shape in ((4, 8, 9, 9), (16, 8, 3, 3), (16, 2), (2, 8, 3, 3))
    )
    core.requires_grad_()

    def step():
        y = lora_edge.ops.tt_block(x, weight, core, suffix, padding=1, activation="relu", backend=backend)
        return y.detach(), torch.autograd.grad(y.sum(), core)[0]

    want = step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("lean", [True, False])
def test_compile_with_symbolic_sizes(lean):
    model, x = network("1-D")
    lora_edge.adapt(model, 2, lean=lean)
    nn.init.normal_(next(lora_edge.trainable_parameters(model)), std=0.1)
    parameters = list(lora_edge.trainable_parameters(model))
    want = torch.autograd.grad(model(x).square().sum(), parameters)
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(model, dynamic=True, backend="aot_eager")(x).square().sum(), parameters)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4 * float(w.norm()))
