"""The choices of one program: a random generator, the layers made so far and the changes that may come between its steps."""

from __future__ import annotations

import random
from typing import Any


class Layers:
    """Makes layers as text: each is an attribute that ``__init__`` sets, with changes that a step may apply to it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.dims = rng.choice((1, 2, 2))
        self.init: list[str] = []
        self.changes: list[str] = ["m.train(not m.training)", "m.flag = not m.flag", "m.gain = 0.5", 'ns["FACTOR"] = 0.5']
        self.names = 0
        self.blocks: list[str] = []
        self.generator = False
        self.pure = rng.randint(0, 9) < 5  # nothing that keeps a forward from being proven pure

    def pick(self, *values: Any) -> Any:
        return self.rng.choice(values)

    def new(self, prefix: str = "v") -> str:
        self.names += 1
        return f"{prefix}{self.names}"

    def layer(self, make: str, prefix: str = "l") -> str:
        name = self.new(prefix)
        self.init.append(f"self.{name} = {make}")
        return f"self.{name}"

    # layers

    def conv_text(self) -> str:
        d = self.dims
        rest = self.pick(
            "3, padding=1", "3, padding=1, bias=False", "1", "3, padding='same'", "3, padding=1, groups=4", "3, padding=1, groups=2",
            "3, padding=1, padding_mode='circular'", "3, padding=2, dilation=2",
        )  # fmt: skip
        return f"nn.Conv{d}d(4, 4, {rest})"

    def conv(self) -> str:
        name = self.layer(self.conv_text(), "c")
        m = name.replace("self.", "m.")
        self.changes += [f"{m}.weight.data.mul_(0.5)", f"{m}.register_forward_hook(lambda s, a, out: out * 1.5)"]
        return name

    def bn_text(self) -> str:
        return f"nn.BatchNorm{self.dims}d(4)"

    def bn(self) -> str:
        name = self.layer(self.bn_text(), "b")
        m = name.replace("self.", "m.")
        self.changes += [
            f"{m}.running_mean.data.add_(0.5)", f"{m}.weight.data.mul_(1.5)", f"{m}.eps = 0.1", f"{m}.train()",
            f"{m}.register_forward_pre_hook(lambda s, a: (a[0] * 2,))",
        ]  # fmt: skip
        return name

    def act(self) -> str:
        make = self.pick(
            "nn.ReLU()", "nn.ReLU(inplace=True)", "nn.ReLU6()", "nn.LeakyReLU(0.1)", "nn.Hardtanh(-0.5, 0.5)", "nn.GELU()",
            "nn.Hardsigmoid()", "nn.SiLU(inplace=True)", "nn.Tanh()",
        )  # fmt: skip
        name = self.layer(make, "a")
        m = name.replace("self.", "m.")
        self.changes += [f"{m[:2]}{m[2:]} = nn.Tanh()", f"{m}.inplace = True"] if "ReLU" in make else []
        return name

    def nonlinear(self, x: str) -> str:
        return self.pick(
            f"{self.act()}({x})", f"F.relu({x})", f"{x}.relu()", f"torch.relu({x})", f"F.relu({x}, inplace=True)", f"{x}.relu_()",
            f"F.leaky_relu({x}, 0.2)", f"F.hardtanh({x}, -1.0, 1.0)", f"F.relu(input={x})", f"torch.sigmoid({x})",
        )  # fmt: skip

    def block_class(self) -> str:
        kind = self.pick("Block", "Block", "Sub", "Stateful")
        drop = ", 0.5" if kind != "Stateful" and self.pick(0, 1) else ""
        name = self.layer(f"{kind}({self.conv_text()}, {self.bn_text()}{drop})", "k")
        m = name.replace("self.", "m.")
        self.blocks.append(kind)
        self.changes += [
            f"{m}.flag = not {m}.flag", f"{m}.gain = 0.75", f"{m}.act = nn.Tanh()", f"{m}.eval()", 'ns["Block"].style = "tanh"',
            f"{m}.forward = types.MethodType(lambda self, x, *a, **k: x * 2, {m})", f"{m}.drop.p = 0.25",
            f"{m}.tail = lambda x: x", f"{m}.conv = nn.Conv{self.dims}d(4, 4, 1, dtype=x.dtype).requires_grad_(False)",
            f"{m}.register_forward_hook(lambda s, a, out: out + 1)", f"{m}.register_full_backward_hook(lambda s, i, o: None)",
            f"once({m})", f"flips({m}, m)", f"{m}.register_forward_pre_hook(lambda s, a, k: (a, k), with_kwargs=True)",
            f"{m}.conv.register_forward_hook(lambda s, a, out: None)", 'ns["Block"].tail = lambda self, x: x * 3',
            f"{m}.conv.register_full_backward_hook(lambda s, i, o: None)",
        ]  # fmt: skip
        return name

    def nest(self, lines: list[str]) -> list[str]:
        return ["    " + line for line in lines]
