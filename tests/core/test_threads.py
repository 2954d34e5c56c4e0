"""Many threads at once: each adapts, trains, infers, saves and merges models of its own, while another one serves a model.

``LORA_EDGE_THREADS_SECONDS=60`` runs for a minute instead of a few seconds.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_edge
from lora_edge.nn.blocks import LeanModule

SECONDS = float(os.environ.get("LORA_EDGE_THREADS_SECONDS", "5"))
WORKERS = 8


class Block(nn.Module):
    """A residual block that reads a flag."""

    def __init__(self, width: int, flag: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(width, width, 3, padding=1), nn.BatchNorm1d(width)
        self.again, self.norm = nn.Conv1d(width, width, 3, padding=1, groups=2), nn.BatchNorm1d(width)
        self.flag = flag

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        y = self.norm(self.again(y))
        return F.relu(y + x) if self.flag else F.relu(y)


class Net(nn.Module):
    """Blocks, some of which hold code that is not proven pure."""

    def __init__(self, width: int, blocks: int, flag: bool, opaque: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, width, 5, padding=2), nn.BatchNorm1d(width), nn.ReLU())
        self.body = nn.ModuleList([Block(width, flag) for _ in range(blocks)])
        self.head, self.opaque, self.calls = nn.Linear(width, 4), opaque, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.opaque:
            self.calls += 1
        x = self.stem(x)
        for block in self.body:
            x = block(x)
        return self.head(x.mean(-1))


def base(number: int) -> nn.Module:
    """The model of a number, always the same; the caller holds the lock on torch's generator."""
    torch.manual_seed(number)
    model = Net(4 + 2 * (number % 3), 1 + number % 4, number % 2 == 0, number % 5 == 3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model.double()


def life(model: nn.Module, x: Tensor, target: Tensor, path: Path) -> list[Tensor]:
    """Adapt, train, infer, save, load, flip modes and merge; return the outputs on the way."""
    copied = copy.deepcopy(model)
    outputs = []
    lora_edge.adapt(model, 2)
    optimizer = torch.optim.SGD(list(lora_edge.trainable_parameters(model)), lr=0.05)
    for step in range(3):
        model.train(step % 2 == 0)
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        outputs.append(loss.detach())
    with torch.no_grad():
        outputs.append(model.eval()(x))
    with lora_edge.disabled(model), torch.no_grad():
        outputs.append(model(x))
    lora_edge.save_adapter(model, path)
    lora_edge.load_adapter(copied, path)
    outputs.append(copied.eval()(x).detach())
    lora_edge.merge(model)
    with torch.no_grad():
        outputs.append(model(x))
    return outputs


def start(work: Callable[[int], None], count: int) -> list[BaseException]:
    """Run ``work(k)`` in threads until all are done; return what they raised."""
    raised: list[BaseException] = []

    def guarded(k: int) -> None:
        try:
            work(k)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.fixture
def one_thread_each():
    """Limit torch to one thread: pools of eight threads would only wait for each other, and sums keep one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_eight_threads_adapt_train_infer_save_and_merge(tmp_path, one_thread_each):
    patched = {
        name: getattr(nn.Module, name) for name in ("__call__", "__getattr__", "__setattr__", "forward", "register_module")
    }
    numbers = range(10)
    models = [base(k) for k in numbers]
    x, target = torch.randn(4, 3, 16, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    serial = [life(copy.deepcopy(models[k]), x, target, tmp_path / "serial.safetensors") for k in numbers]

    served = [lora_edge.adapt(base(20), 2).eval(), base(20).eval(), nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()).double()]
    with torch.no_grad():
        answers = [model(x) for model in served]
    until = time.monotonic() + SECONDS
    counts = [0] * (WORKERS + 1)

    def work(k: int) -> None:
        rounds = 0
        while time.monotonic() < until or rounds < 1:
            rounds += 1
            if k == WORKERS:  # serves
                with torch.no_grad():
                    for model, answer in zip(served, answers, strict=True):
                        assert torch.equal(model(x), answer)
            else:
                number = (k + rounds) % len(models)
                found = life(copy.deepcopy(models[number]), x, target, tmp_path / f"{k}.safetensors")
                assert all(map(torch.equal, found, serial[number])), f"model {number} in thread {k}"
            counts[k] += 1

    raised = start(work, WORKERS + 1)
    assert raised == [], raised[0]
    assert min(counts) >= 1
    assert {name: getattr(nn.Module, name) for name in patched} == patched, "something global was left patched"
    assert nn.ReLU()(torch.tensor(-1.0)) == 0


def test_threads_that_adapt_one_class_fuse_alike(one_thread_each):
    models = [base(2) for _ in range(4)]
    expected = lora_edge.adapt(base(2), 2)
    barrier = threading.Barrier(4)
    classes: list[Any] = [None] * 4

    def work(k: int) -> None:
        barrier.wait()
        lora_edge.adapt(models[k], 2)
        classes[k] = type(models[k])

    for _ in range(5):
        assert start(work, 4) == []
        for model in models:
            assert isinstance(model, LeanModule)
            assert model._lora_edge.blocks == expected._lora_edge.blocks
        assert len(set(classes)) == 1, "one fused class a class"
        models = [base(2) for _ in range(4)]


def test_first_steps_of_one_model_in_threads(one_thread_each):
    """Threads that meet a model whose plans are not made yet, or not for this mode and these arguments."""
    model = lora_edge.adapt(base(1), 2)
    inputs = [torch.randn(2, 3, 8 + k, dtype=torch.float64) for k in range(4)]
    wanted = [lora_edge.adapt(base(1), 2)(x) for x in inputs]
    barrier = threading.Barrier(4)

    def work(k: int) -> None:
        barrier.wait()
        for _ in range(5):
            assert torch.equal(model(inputs[k]), wanted[k])

    assert start(work, 4) == []
