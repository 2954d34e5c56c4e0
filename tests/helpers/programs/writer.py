"""Writes random programs: statements in random order, a return value, options of ``adapt`` and steps."""

from __future__ import annotations

import random
import re
from typing import Any

from helpers.programs.program import Program, Step
from helpers.programs.statements import Statements

IMPURE = """with |try:|random|np\\.|gen|self.calls|self.log|LOG|self.last|self.table\\['n'|self.seen \\+|type\\(x|hasattr|__dict__|float\\(
x.requires_grad|\\.data|raise|lambda|__|count\\(|quiet|partial|next\\(|sorted|made|default|Noisy|Stateful|is_cuda|x.shape\\[-1\\] >
x.size\\(0\\) ==|is_contiguous|len\\(x|:=|self.o|Caught|bump|rnd|dice|len\\(\\{|'%d'|shape\\[1\\]|iter|finally|value|is_leaf|\\.T\\."""
_impure = re.compile(IMPURE.replace("\n", "|"))


class Writer(Statements):
    """Writes one program with the choices of a random generator."""

    def statement(self) -> list[str]:
        kinds = (
            [self.s_block] * 4 + [self.s_conv_act] * 2 + [self.s_residual] * 4 + [self.s_child] * 3 + [self.s_pad, self.s_shared]
            + [self.s_loop, self.s_sequential, self.s_module_dict, self.s_wrapped, self.s_outside] + [self.s_branch] * 2
            + [self.s_values] * 2 + [self.s_view] * 3 + [self.s_write] * 2 + [self.s_dice, self.s_context] + [self.s_other] * 3
            + [self.s_python]
        )  # fmt: skip
        while True:
            before = len(self.init), len(self.changes), len(self.blocks), self.generator
            lines = self.rng.choice(kinds)()
            self.drop_unused(lines, *before[:2])
            if not (self.pure and _impure.search("\n".join([*lines, *self.init[before[0] :]]))):
                return lines
            del self.init[before[0] :], self.changes[before[1] :], self.blocks[before[2] :]
            self.generator = before[3]

    def drop_unused(self, lines: list[str], init: int, changes: int) -> None:
        """Remove the layers that were made for alternatives that were not chosen."""
        used = {*re.findall(r"self\.(\w+)", "\n".join(lines))}
        made = {line: re.match(r"self\.(\w+) =", line) for line in self.init[init:]}
        unused = {found[1] for found in made.values() if found and found[1] not in used}
        self.init[init:] = [line for line, found in made.items() if not found or found[1] not in unused]
        self.changes[changes:] = [c for c in self.changes[changes:] if not unused & {*re.findall(r"\bm\.(\w+)", c)}]

    def program(self) -> Program:
        body: list[str] = []
        keeps = []
        for k in range(self.rng.randint(2, 6)):
            body += self.statement()
            if self.pick(0, 0, 0, 1):
                body.append(f"out{k} = x")
                keeps.append(f"out{k}")
        split = self.pick(0, 0, 1)
        below = self.block_statement_class() if split else []
        returns = self.pick(
            "x", "x", "x", "x, x.mean()", "{'y': x, 'n': x.shape[0]}", "[x, x.flatten(1)]", "x.flatten(1)", "x.view(x.shape[0], -1)",
            "x.mean(-1)", f"F.adaptive_avg_pool{self.dims}d(x, 1).flatten(1)", "x.transpose(1, -1)", "(x, )", "(x, x)", "self.log, x",
            ", ".join(["x", *keeps]) if keeps else "x",
        )  # fmt: skip
        text = self.text([*body, *below], returns)
        rng = self.rng
        steps = [self.step(k) for k in range(rng.randint(2, 4))]
        if self.dims == 2:  # torch's BatchNorm gets the gradient of a channels-last map wrong where N = 1 has an odd stride
            for step in steps:
                step.batch = 3 if step.batch == 1 else step.batch
        options: dict[str, Any] = {}
        if self.pick(0, 0, 0, 1):
            options["bn"] = "batch"
        if self.pick(0, 0, 0, 1):
            options["backend"] = "torch"
        return Program(
            text, self.dims, self.pick(*[True] * 9, False), options, steps, self.pick(False, False, True), self.generator
        )

    def block_statement_class(self) -> list[str]:
        return [f"x = {self.block_class()}(x)"]

    def text(self, body: list[str], returns: str) -> str:
        init = "\n".join("        " + line for line in self.init)
        lines = "\n".join("        " + line for line in body)
        decorator = self.pick("", "", "", "", "    @decorated\n", "" if self.pure else "    @torch.enable_grad()\n")
        return f"""
class Program(Above):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv{self.dims}d(4, 4, 3, padding=1)
        self.flag, self.gain, self.mode, self.limit, self.stop, self.calls = True, 1.25, Mode.A, 5, 7, 0
        self.table, self.items, self.log, self.cfg = {{"a": 0.5}}, [0.5, 1.0], [], Config()
        self.space = types.SimpleNamespace(k=2.0)
        self.npgen, self.rnd, self.dice = np.random.default_rng(4), random.Random(5), iter([0.5] * 99)
        self.h2, self.__private = 1.5, 0.75
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
{init}

{decorator}    def forward(self, x, scale=1.0, flag=False, *, extra=None):
{lines}
        if extra is not None:
            x = x + extra
        x = x * scale
        return {returns}
"""

    def step(self, number: int) -> Step:
        rng = self.rng
        count = 0 if number == 0 else rng.choice((0, 1, 1, 2, 3))
        return Step(
            changes=[rng.choice(self.changes) for _ in range(count)],
            layout=self.pick("contiguous", "contiguous", "contiguous", "contiguous", "channels-last", "transposed", "sliced", "expanded"),
            batch=self.pick(2, 2, 2, 3, 1, 0) if number else 2,
            length=self.pick(5, 5, 5, 6),
            requires_grad=self.pick(True, True, False),
            dtype=self.pick(*["own"] * 12, "other"),
            arguments=self.pick("x", "x", "x", "x", "x, 0.5", "x, scale=2.0", "x=x", "x, 1.0, True", "x, extra=x", "x, flag=True"),
            context=self.pick(
                *["contextlib.nullcontext()"] * 10, "lora_edge.disabled(m)", "torch.no_grad()", "torch.autocast('cpu', torch.bfloat16)"
            ),
            copies=self.pick(*[False] * 9, True) and not self.generator,
            seed=rng.randint(0, 999),
        )  # fmt: skip


def write(rng: random.Random) -> Program:
    """A random program."""
    return Writer(rng).program()
