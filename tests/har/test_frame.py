"""Turns of the sensor's axes: which there are, that they keep the physics, and that a planted one is found."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lora_edge.har.data import Split, Windows
from lora_edge.har.frame import find_turn, mirrored, named, turned, turns
from lora_edge.har.training import train_source

NAMES = ["ax", "ay", "az", "wx", "wy", "wz"]
MEAN, STD = np.array([0.5, -0.3, 0.2, 0.1, 0.0, -0.2]), np.array([0.7, 0.6, 1.0, 0.5, 0.7, 1.5])


def windows(count: int, seed: int, names: list[str] = NAMES) -> Windows:
    """Raw windows of three activities: each accelerates along its own axis and rotates about it, always in one direction."""
    random = np.random.default_rng(seed)
    y = np.arange(count) % 3
    phase = random.uniform(0, 6, (count, 1, 1))
    pulses = np.maximum(0, np.sin(np.linspace(0, 12, 40) + phase))
    mine = np.arange(6)[:, None] % 3 == y[:, None, None]
    x = pulses * mine * (1 + np.arange(6)[:, None] / 3) + 0.1 * random.standard_normal((count, 6, 40))
    zero = np.zeros(count, dtype=np.int64)
    return Windows(x.astype(np.float32), y, zero, zero, np.zeros((count, 2)), ["a", "b", "c"], names, ["0"])


def task_of(names: list[str] = NAMES) -> Split:
    """Normalised windows; source and target wear the sensor alike."""
    parts = []
    for count, seed in ((240, 0), (30, 1), (30, 2)):
        part = windows(count, seed, names)
        parts.append(replace(part, x=((part.x - MEAN[:, None]) / STD[:, None]).astype(np.float32)))
    return Split(*parts, mean=MEAN, std=STD, protocol="B", target=1)


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm1d(6), nn.Conv1d(6, 16, 5), nn.BatchNorm1d(16), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(16, 3),
    )  # fmt: skip
    return train_source(model, task_of().source, epochs=30, lr=1e-2)


def test_there_are_48_turns_and_as_worn_is_the_first():
    found = turns(NAMES)
    assert np.array_equal(found[0], np.eye(6))
    assert len({turn.tobytes() for turn in found}) == 48
    for turn in found:
        assert np.array_equal(turn @ turn.T, np.eye(6))
        assert not turn[:3, 3:].any()
        assert not turn[3:, :3].any()


def test_a_cross_product_turns_with_its_factors():
    """The rate of rotation is a pseudovector: (R a) x (R b) = det(R) R (a x b)."""
    a, b = np.random.default_rng(0).standard_normal((2, 3))
    for turn in turns(NAMES):
        rotation = turn[:3, :3]
        both = np.concatenate([rotation @ a, np.cross(rotation @ a, rotation @ b)])
        assert np.allclose(turn @ np.concatenate([a, np.cross(a, b)]), both)


@pytest.mark.parametrize(
    "names",
    [
        ["acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z"],
        ["wz", "AY", "az", "pulse", "ax", "magx"],
        ["Acc X", "acc y", "acc Z"],
    ],
)
def test_names_of_axes(names):
    found = turns(names)
    assert len(found) == 48
    for place, name in enumerate(names):
        if name in ("pulse", "magx", "wz"):  # no axis, or one of a vector that is not whole
            assert all(turn[place, place] == 1 for turn in found)


@pytest.mark.parametrize("names", [["ax", "ay"], ["left ax", "left ay", "left az"], ["1", "2", "3", "4", "5", "6"], []])
def test_other_channels_are_not_turned(names):
    (alone,) = turns(names)
    assert np.array_equal(alone, np.eye(len(names)))


def test_a_planted_turn_is_found(source):
    task = task_of()
    before = copy.deepcopy(source.state_dict())
    flags = [module.training for module in source.modules()]
    generator = torch.get_rng_state()
    for turn in turns(NAMES)[::5]:
        worn = turned(task, turn.T)
        assert np.array_equal(find_turn(source, worn), turn)
        back = turned(worn, turn)
        for own, again in ((task.adapt, back.adapt), (task.test, back.test)):
            assert np.allclose(own.x, again.x, atol=1e-5)
            assert again.x.dtype == np.float32
        assert back.source is task.source
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert [module.training for module in source.modules()] == flags
    assert torch.equal(torch.get_rng_state(), generator)


def test_without_evidence_the_axes_stay(source):
    """Labels that no turn explains, and windows that the model already recognises."""
    task = task_of()
    assert np.array_equal(find_turn(source, task), np.eye(6))
    task.adapt.x[:] = 0
    assert np.array_equal(find_turn(source, task), np.eye(6))
    other_names = task_of(["1", "2", "3", "4", "5", "6"])
    assert np.array_equal(find_turn(source, turned(other_names, turns(NAMES)[7])), np.eye(6))


def test_a_single_window_is_enough_for_the_search(source):
    task = task_of()
    first = np.arange(len(task.adapt)) == 0
    assert find_turn(source, Split(task.source, task.adapt.where(first), task.test, MEAN, STD, "B", 1)).shape == (6, 6)


def test_as_worn_is_the_same_split():
    task = task_of()
    assert turned(task, np.eye(6)) is task


def test_the_other_wrist_is_one_of_the_turns():
    task = task_of()
    (mirror,) = [turn for turn in turns(NAMES) if named(turn, NAMES) == ["-ax", "ay", "az", "wx", "-wy", "-wz"]]
    assert np.array_equal(turned(task, mirror).test.x, mirrored(task).test.x)
