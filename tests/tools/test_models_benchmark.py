"""benchmarks.models: the rows of models that are right, refused, wrong or broken, or that end the process."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import Tensor, nn

import lora_edge
from benchmarks import models, time_series_models
from benchmarks.model_zoo import Definition, definitions
from helpers.networks import one_d


def definition(build) -> Definition:
    return Definition("a model", "here", (6, 50), build)


class Counts(nn.Module):
    """A model whose own buffer moves in training mode, as in the base, which is right."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1  # type: ignore[assignment,operator]
        return self.conv(x)


def test_right():
    row = models.examine(definition(one_d))
    assert row["verdict"] == "right"
    assert row["convolutions"] == row["adapted"] == 2
    assert row["same_output"] == row["round_trip"] == row["merged_keys"] == "yes"
    assert 0 < row["saved_bytes"] < row["full_bytes"]
    assert row["fused"] + row["alone"] == 2


def test_refused():
    row = models.examine(definition(lambda: nn.Sequential(nn.Flatten(), nn.Linear(300, 2))))
    assert row["verdict"] == "refused"
    assert "no nn.Conv1d" in row["refused"]


def test_a_buffer_of_the_models_own_may_move():
    row = models.examine(definition(Counts))
    assert (row["moved"], row["verdict"]) == (0, "right")


def test_statistics_that_move_are_wrong(monkeypatch):
    adapt = lora_edge.adapt
    monkeypatch.setattr(lora_edge, "adapt", lambda model, rank, lean=True: adapt(model, rank, lean=lean, bn="batch"))
    row = models.examine(definition(one_d))
    assert row["moved"] == 3
    assert "moved" in row["verdict"]


@pytest.mark.parametrize(
    ("owner", "name", "broken", "wrong"),
    [
        (lora_edge, "merge", lambda model: model, "merged_keys"),
        (lora_edge, "load_adapter", lambda model, path: model, "round_trip"),
        (models, "saved_bytes", lambda model, x: 1 / 0, "saved_bytes"),
    ],
)
def test_wrong(monkeypatch, owner, name, broken, wrong):
    monkeypatch.setattr(owner, name, broken)
    row = models.examine(definition(one_d))
    assert row["verdict"].startswith("wrong: ")
    assert wrong in row["verdict"]


def test_a_gradient_that_is_not_the_twins_is_wrong(monkeypatch):
    adapt = lora_edge.adapt

    def other_scale(model: nn.Module, rank: int, lean: bool = True) -> nn.Module:
        adapt(model, rank, lean=lean)
        for layer in model.modules():
            if isinstance(layer, lora_edge.LoRAEdgeConv1d) and lean:
                layer.scale *= 1.001
        return model

    monkeypatch.setattr(lora_edge, "adapt", other_scale)
    row = models.examine(definition(one_d))
    assert "gradient_error" in row["verdict"]


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: nn.Sequential(nn.Conv1d(5, 8, 3)), "not examined: RuntimeError: "),
        (lambda: 1 / 0, "not examined: ZeroDivisionError: division by zero"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "not examined: the process ended with -9"),
    ],
)
def test_what_breaks_is_a_row(build, why):
    row = models.in_a_process(definition(build))
    assert row["verdict"].startswith(why)
    assert row["model"] == "a model"


@pytest.mark.parametrize("name", time_series_models.MODELS)
def test_time_series_models_accept_any_batch(name):
    model = time_series_models.build(name)
    for batch in (1, 3):
        y = model(torch.randn(batch, time_series_models.CHANNELS, time_series_models.LENGTH))
        assert y.shape[:2] == (batch, time_series_models.CLASSES)


def test_there_are_more_than_sixty_where_torchvision_and_timm_are():
    found = definitions()
    assert len([name for name in found if name.startswith("time series: ")]) >= 25
    if any(name.startswith("timm: ") for name in found):
        assert len(found) >= 60
