"""Find how the target's sensor is worn: the turn of its axes that minimises the source model's cross-entropy.

Changing wrists, or putting a phone into the pocket upside down, turns or mirrors the sensor's axes, and no small update of the
weights undoes that. There are 48 ways to lay three axes along three others. Under such a signed permutation ``R``,
acceleration ``a`` becomes ``R a``, and the rate of rotation ``w``, a pseudovector, becomes ``det(R) R w``. The other wrist is
the mirror ``R = diag(-1, 1, 1)``, which negates (ax, wy, wz).

The person's labelled adaptation windows decide: the turn with the smallest cross-entropy of the source model wins, with
BatchNorm on batch statistics. The prior gives "as worn" the same probability as the 47 other turns together, so another turn
must gain ``log 47`` nats of likelihood; once the best cost is below that, no turn can win against it and the search stops.
The seven turns that exchange no axes are tried first, then the rest. Each group is narrowed in rounds: all turns on a quarter
of the windows, the best quarter of them on half, the best quarter of those on all.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lora_edge.har.data import Split, Windows
from lora_edge.nn.bn_statistics import on_batch_statistics
from lora_edge.surgery.batch_statistics import has_statistics

SAMPLES = 16  # windows that decide, spread evenly over the adaptation windows
FLIPS = 7  # turns that exchange no axes; they follow "as worn" in turns()
MIRRORED_CHANNELS = ("ax", "wy", "wz")  # change sign when the watch moves to the other wrist
VECTORS = (  # channel names of a sensor's three axes, and whether it measures a pseudovector
    (re.compile(r"(?:a|acc|accel|accelerometer)[ _]?([xyz])", re.IGNORECASE), False),
    (re.compile(r"(?:w|g|gyr|gyro|gyroscope)[ _]?([xyz])", re.IGNORECASE), True),
    (re.compile(r"(?:m|mag|magnetometer)[ _]?([xyz])", re.IGNORECASE), True),
)


def turns(channels: list[str]) -> list[np.ndarray]:
    """Return the turns that these channel names allow, signed permutations ``(C, C)``; the first is as worn, the identity.

    The axes are ``ax ay az``, ``wx wy wz`` and the like, of one device; without such axes only the identity is returned. Other
    channels are not turned.
    """
    as_worn = np.eye(len(channels))
    vectors = []
    for pattern, is_pseudovector in VECTORS:
        names = {match[1].lower(): place for place, name in enumerate(channels) if (match := pattern.fullmatch(name))}
        if len(names) == 3:
            vectors.append(([names[axis] for axis in "xyz"], is_pseudovector))
    if not vectors:
        return [as_worn]
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            rotation = np.diag(signs)[:, order]
            turn = as_worn.copy()
            for places, is_pseudovector in vectors:
                turn[np.ix_(places, places)] = rotation * (np.linalg.det(rotation).round() if is_pseudovector else 1.0)
            found.append(turn)
    return found


def find_turn(model: nn.Module, task: Split) -> np.ndarray:
    """Return the turn ``(C, C)`` that minimises the source model's cross-entropy on ``task.adapt``.

    Args:
        model: the source model, which is not changed.
        task: normalised windows of the person to adapt to. With only one window, from which a BatchNorm gets a single value
            per channel, the answer is as worn.
    """
    as_worn, *others = turns(task.adapt.channels)
    if not others:
        return as_worn
    evidence = math.log(len(others))
    spread = np.linspace(0, len(task.adapt) - 1, min(len(task.adapt), SAMPLES)).round().astype(int)
    if len(spread) == 1 and not has_statistics(model, torch.from_numpy(task.adapt.x)):
        return as_worn
    with torch.no_grad(), on_batch_statistics(model):

        def cost(turn: np.ndarray, windows: np.ndarray) -> float:
            few = task.adapt.where(windows)
            logits = model(torch.from_numpy(_turned(few, turn, task).x))
            return float(F.cross_entropy(logits, torch.from_numpy(few.y), reduction="sum"))

        own = cost(as_worn, spread)
        best, least = as_worn, own
        for found in (others[:FLIPS], others[FLIPS:]):
            if least <= evidence:
                break
            for step in (4, 2, 1):
                few = spread[::step] if len(spread) > step else spread[:2]  # BatchNorm may need more than one window
                costs = [cost(turn, few) for turn in found]
                order = np.argsort(costs)[: math.ceil(len(found) / 4)]
                found = [found[k] for k in order]
            if costs[order[0]] < least:
                best, least = found[0], costs[order[0]]
    return best if own - least > evidence else as_worn


def turned(task: Split, turn: np.ndarray) -> Split:
    """Return the split with the target's raw axes turned: a raw sample ``s (C,)`` becomes ``turn @ s``."""
    if np.array_equal(turn, np.eye(len(turn))):
        return task  # bit-identical, without rounding
    return replace(task, adapt=_turned(task.adapt, turn, task), test=_turned(task.test, turn, task))


def mirrored(task: Split) -> Split:
    """Return the split with the target's raw (ax, wy, wz) negated, as if the watch were on the other wrist.

    Raises:
        ValueError: the data do not have these channels.
    """
    names = task.test.channels
    if any(name not in names for name in MIRRORED_CHANNELS):
        raise ValueError(f"mirroring needs the channels {', '.join(MIRRORED_CHANNELS)}; the data have {', '.join(names)}")
    return turned(task, np.diag(np.where(np.isin(names, MIRRORED_CHANNELS), -1.0, 1.0)))


def named(turn: np.ndarray, channels: list[str]) -> list[str]:
    """Return which channel stands in each place after the turn, such as ``-ax``."""
    return [f"{'-' if row.sum() < 0 else ''}{channels[int(np.abs(row).argmax())]}" for row in turn]


def _turned(part: Windows, turn: np.ndarray, task: Split) -> Windows:
    mean, std = task.mean[:, None], task.std[:, None]
    raw = part.x * std + mean
    return replace(part, x=((np.einsum("ij,njt->nit", turn, raw) - mean) / std).astype(np.float32))
