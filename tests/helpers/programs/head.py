"""What every random program begins with: globals, helpers, closures and the classes of its layers, as text."""

from __future__ import annotations

import linecache

HEAD = """
import contextlib, dataclasses, enum, functools, random, types
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FLAG, FACTOR, TABLE, ITEMS, LOG, COUNT = True, 1.25, {"a": 1.0, "b": 2.0}, [1.0, 0.5], [], 0


class Mode(enum.Enum):
    A = 1
    B = 2


@dataclasses.dataclass
class Config:
    gain: float = 1.5
    on: bool = True
    order: tuple = (0, 1)
    names: list = dataclasses.field(default_factory=lambda: ["a"])


def helper(x, k=0.75, *rest, flag=True, **named):
    if flag:
        return x * k
    return x


def count(x):
    global COUNT
    COUNT += 1
    return x * (1 + COUNT / 8)


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def closure(k):
    def inner(x):
        return x * k

    def change(value):
        nonlocal k
        k = value

    return inner, change


scaled, change_cell = closure(1.5)
twice = lambda x: x * 2.0; half = lambda x: x * 0.5  # noqa


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Noisy(nn.Module):
    def forward(self, x):
        return x * random.random()


class Caught(nn.Module):
    def forward(self, x):
        try:
            return x * 1.5
        except ValueError:
            return x


class Block(nn.Module):
    style = "relu"

    def __init__(self, conv, bn, drop=0.0):
        super().__init__()
        self.conv, self.bn, self.act, self.drop, self.flag, self.gain = conv, bn, nn.ReLU(), nn.Dropout(drop), True, 1.0

    @property
    def doubled(self):
        return self.gain * 2

    @staticmethod
    def shift(x, by=0.1):
        return x + by

    def tail(self, x):
        return self.act(x) if self.style == "relu" else torch.tanh(x)

    def forward(self, x, add=None, scale=1.0):
        y = self.bn(self.conv(x))
        if add is not None:
            y = y + add
        if self.flag:
            y = self.tail(y)
        return self.drop(y) * scale


class Sub(Block):
    def forward(self, x, *args, **kwargs):
        return super().forward(self.shift(x), *args, **kwargs) * self.doubled


class Stateful(Block):
    def __init__(self, conv, bn):
        super().__init__(conv, bn)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.log = 0, []

    def forward(self, x):
        self.calls += 1
        self.log.append(tuple(x.shape))
        self.seen += 1
        return super().forward(x) * (1 + self.calls / 16)


def math_pi():
    return 3.0


class Above(nn.Module):
    scale = 1.25

    @property
    def factor(self):
        return self.gain * 0.5

    def method(self, x, k=1.5):
        return x * k * self.gain

    @decorated
    def wrapped(self, x):
        return self.method(x)

    @torch.no_grad()
    def quiet(self, x):
        return x * 1.5

    @staticmethod
    def static(x):
        return x * 0.5

    @classmethod
    def made(cls, x):
        return x * cls.scale

    def default(self, x, kept=[]):
        kept.append(1)
        return x * len(kept)

    def recursive(self, x, n):
        return x if n == 0 else self.recursive(x * 0.9, n - 1)

    def bump(self, x, k):
        x = x * k
        self.bumped = k
        return True

    def forward(self, x):
        return x
"""
HEAD_FILE = "<head of the programs>"
linecache.cache[HEAD_FILE] = (len(HEAD), None, HEAD.splitlines(keepends=True), HEAD_FILE)
CODE = compile(HEAD, HEAD_FILE, "exec", dont_inherit=True)
