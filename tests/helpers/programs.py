"""Random small programs: the source text of a module's class, and what happens between its steps.

Everything keeps maps at ``(N, 4, *L)``, so that statements can follow each other in any order. A program is text, which is
executed once for each twin, so that globals, closures and classes are not shared between them.
"""

from __future__ import annotations

import linecache
import random
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from helpers import program_head

IMPURE = """with |try:|random|np\\.|gen|self.calls|self.log|LOG|self.last|self.table\\['n'|self.seen \\+|type\\(x|hasattr|__dict__|float\\(
x.requires_grad|\\.data|raise|lambda|__|count\\(|quiet|partial|next\\(|sorted|made|default|Noisy|Stateful|is_cuda|x.shape\\[-1\\] >
x.size\\(0\\) ==|is_contiguous|len\\(x|:=|self.o|Caught|bump|rnd|dice|len\\(\\{|'%d'|shape\\[1\\]|iter|finally|value|is_leaf|\\.T\\."""
_impure = re.compile(IMPURE.replace("\n", "|"))


@dataclass
class Program:
    """A program.

    Attributes:
        text: of a module with a class ``Program``.
        dims: of its convolutions.
        shown: whether the source can be read.
        options: of ``adapt``.
        steps: what happens before each step to a twin (code on ``m``, ``ns``), and how it is called.
        float32: the arithmetic, else float64.
    """

    text: str
    dims: int
    shown: bool
    options: dict[str, Any]
    steps: list[Step]
    float32: bool = False
    generator: bool = False


@dataclass
class Step:
    """One step: code that runs before it, the inputs' make and the call."""

    changes: list[str] = field(default_factory=list)
    layout: str = "contiguous"
    batch: int = 2
    length: int = 5
    requires_grad: bool = True
    dtype: str = "own"
    arguments: str = "x"
    context: str = "contextlib.nullcontext()"
    copies: bool = False
    seed: int = 0


class Writer:
    """Writes one program with the choices of a random generator."""

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

    # statements: each gives lines that set x

    def s_block(self) -> list[str]:
        return [f"x = {self.nonlinear(f'{self.bn()}({self.conv()}(x))')}"]

    def s_conv_act(self) -> list[str]:
        return [f"x = {self.nonlinear(f'{self.conv()}(x)')}"]

    def s_residual(self) -> list[str]:
        y = self.new()
        add = self.pick(
            f"{y} + x", f"x + {y}", f"{y}.add(x)", f"torch.add({y}, x)", f"torch.add({y}, x, alpha=2)", f"{y} + x * 2"
        )
        body = [f"{y} = {self.bn()}({self.conv()}(x))"]
        if self.pick(0, 1):
            body.append(f"x = {self.bn()}({self.conv()}(x))" if self.pick(0, 1) else f"x = {self.bn()}(x)")
        if self.pick(0, 0, 1):
            body.append(self.pick("x.mul_(0.5)", "x += 1.0", f"{y}.mul_(2.0)", "x[:, 0] = 0.25"))
        if self.pick(0, 0, 1):
            return [*body, self.pick(f"{y} += x", f"x += {y}", f"{y}.add_(x)"), f"x = {self.nonlinear(y)}"]
        return [*body, f"x = {self.nonlinear(f'({add})')}"]

    def s_pad(self) -> list[str]:
        d = self.dims
        amounts = self.pick("(1, 1)" if d == 1 else "(1, 1, 1, 1)", "(2, 0)" if d == 1 else "(2, 0, 1, 1)")
        conv = self.layer(f"nn.Conv{d}d(4, 4, 3)", "c")
        between = [self.pick("x.mul_(2.0)", "x.add_(1.0)")] if self.pick(0, 0, 0, 1) else []
        pad = self.pick(f"F.pad(x, {amounts})", f"F.pad(x, {amounts}, value=0.5)", f"F.pad(x, {amounts}, mode='replicate')")
        return [f"p = {pad}", *between, f"x = F.relu({conv}(p))"]

    def s_child(self) -> list[str]:
        k = self.block_class()
        extra = self.pick("", "", ", None", ", scale=2.0", ", add=x") if self.blocks[-1] != "Stateful" else ""
        return [f"x = {k}(x{extra})" if self.pick(0, 0, 1) == 0 or extra else f"x = {k}(x=x)"]

    def s_shared(self) -> list[str]:
        k = self.block_class()
        return [f"x = {k}({k}(x))"] if self.pick(0, 1) else [f"x = {k}(x)", f"x = x + {k}(x)"]

    def s_loop(self) -> list[str]:
        parts = ", ".join(f"Block({self.conv_text()}, {self.bn_text()})" for _ in range(2))
        name = self.layer(f"nn.ModuleList([{parts}])", "s")
        m = name.replace("self.", "m.")
        self.changes += [f"{m}[1].flag = False", f"{m}[0] = nn.Identity()", f"del {m}[0]", f"{m}.append(nn.ReLU())"]
        return self.pick(
            [f"for part in {name}:", "    x = part(x)"],
            [f"for k, part in enumerate({name}):", "    x = part(x) if k else part(x) * 0.5"],
            [f"parts = list({name})", "while parts:", "    x = parts.pop(0)(x)"],
            [f"for k in range(len({name})):", f"    x = {name}[k](x)", "    if k == self.stop:", "        break"],
            [f"outs = [part(x) for part in {name}]", "x = sum(outs)"],
            [f"for part in reversed({name}):", "    x = part(x)"],
            [f"for part, k in zip({name}, (0.5, 1.5)):", "    x = part(x) * k"],
        )

    def s_sequential(self) -> list[str]:
        pure = [
            self.conv_text(),
            self.bn_text(),
            "nn.ReLU()",
            f"Block({self.conv_text()}, {self.bn_text()})",
            "nn.Dropout(0.5)",
        ]
        inner = f"nn.Sequential({self.conv_text()}, {self.pick('Noisy()', 'Caught()', 'nn.ReLU()')})"
        parts = [self.pick(*pure, "Noisy()", "Caught()", inner) for _ in range(4)]
        name = self.layer(f"nn.Sequential({self.conv_text()}, {self.bn_text()}, {', '.join(parts)})", "q")
        m = name.replace("self.", "m.")
        self.changes += [f"{m}[1].register_forward_hook(lambda s, a, out: out * 2)", f"{m}[2] = nn.Tanh()", f"{m}.append(nn.ReLU())",
                         f"{m}[0].register_forward_pre_hook(lambda s, a: None)"]  # fmt: skip
        return [f"x = {name}(x)"]

    def s_module_dict(self) -> list[str]:
        name = self.layer(f"nn.ModuleDict({{'in': {self.conv_text()}, 'mid': {self.bn_text()}, 'a-b': nn.ReLU()}})", "d")
        m = name.replace("self.", "m.")
        self.changes += [f"{m}['mid'] = nn.Identity()", f"{m}['more'] = nn.Tanh()"]
        return self.pick(
            [f"x = {name}['a-b']({name}['mid']({name}['in'](x)))"],
            [f"for key, part in {name}.items():", "    x = part(x)"],
            [f"for part in {name}.values():", "    x = part(x)", f"if 'more' in {name}:", "    x = x * 2"],
        )

    def s_outside(self) -> list[str]:
        name = self.new("o")
        self.init.append(f"self.{name} = [nn.Conv{self.dims}d(4, 4, 1).requires_grad_(False).to(DTYPE)]")
        return [f"x = F.relu(self.{name}[0](x))"]

    def s_wrapped(self) -> list[str]:
        k = self.layer(f"Outer(Block({self.conv_text()}, {self.bn_text()}))", "w")
        return [f"x = {k}(x)"]

    def s_branch(self) -> list[str]:
        self.changes += ["m.mode = ns['Mode'].B", "m.cfg.on = False", 'ns["FLAG"] = False', "m.limit = 3", "m.cfg.order = (1,)"]
        test = self.pick(
            "self.flag", "self.training", "FLAG", "self.mode is Mode.A", "self.cfg.on", "x.shape[-1] > 4", "x.dim() == 3",
            "float(x.sum()) > 0", "x.requires_grad", "x.size(0) == 2", "self.limit > 4", "not self.training and self.flag",
            "isinstance(x, torch.Tensor)", "torch.is_tensor(x)", "hasattr(self, 'ghost')", "x.is_contiguous()", "len(x) > 2",
            "type(x) is torch.Tensor", "hasattr(x, 'grad_fn')", "x.dtype == torch.float64", "'gain' in self.__dict__",
            "getattr(self, 'ghost', None) is None", "isinstance(self.cfg, Config)", "x.ndim == 4", "torch.is_grad_enabled()",
            "flag", "1 in self.cfg.order", "self.mode == Mode.A", "x.is_cuda", "(n := x.shape[0]) > 1",
        )  # fmt: skip
        if "ghost" in test:
            self.changes += ["m.ghost = 1"] * 3
        other = self.pick([f"x = {self.nonlinear(f'{self.conv()}(x)')}"], ["x = x * 0.5"], ["pass"])
        return [f"if {test}:", *self.nest([f"x = {self.nonlinear(f'{self.conv()}(x)')}"]), "else:", *self.nest(other)]

    def s_values(self) -> list[str]:
        self.changes += [
            "m.table['a'] = 3.0", "m.items.append(0.5)", "m.cfg.gain = 0.5", 'ns["TABLE"]["a"] = 2.5', 'ns["ITEMS"].append(2.0)',
            'ns["change_cell"](0.5)', 'ns["helper"] = lambda x, *a, **k: x * 2', 'ns["Program"].scale = 0.5', "m.space.k = 3.0",
            'ns["half"] = ns["twice"]', "m.table['c'] = 1.0", 'ns["helper"].__defaults__ = (0.25,)', "m.scale = 2.0",
            'ns["helper"].__kwdefaults__["flag"] = False', 'ns["helper"].__code__ = ns["warmed"].__code__.replace()',
        ][:-1]  # fmt: skip
        return [
            "x = x * "
            + self.pick(
                "self.table['a']", "self.table.get('c', 0.5)", "sum(self.items)", "self.cfg.gain", "FACTOR", "TABLE['a']", "self.scale",
                "self.space.k", "len(ITEMS)", "{4: 0.5, 8: 2.0}.get(x.shape[1], 1.0)", "{4: 0.5}[x.shape[1]]", "self.factor",
                "max(self.items)", "(0.5 if 'c' in self.table else 1.5)", "getattr(self, 'scale', 1.0)", "Mode.A.value",
                "len({0.5, 0.5, 1.0})", "[k * 0.5 for k in ITEMS][0]", "sum(k for k in ITEMS)", "float('%d' % x.shape[0])",
                "(FACTOR or 1.0)", "math_pi()", "x.shape[0]", "next(iter(ITEMS))", "sorted(ITEMS)[0]", "self.cfg.order[-1]",
            )
        ] if self.pick(0, 1) else ["x = " + self.pick(
            "helper(x)", "helper(x, 2.0, 3, flag=False)", "helper(x, flag=self.flag)", "scaled(x)", "twice(x)", "half(x)", "count(x)",
            "self.method(x)", "self.wrapped(x)", "Program.method(self, x)", "self.quiet(x)", "functools.partial(helper, k=2.0)(x)",
            "self.recursive(x, 3)", "helper(*[x, 0.5])", "helper(**{'x': x, 'k': 0.5})", "(lambda z: z * 2)(x)",
            "self.static(x)", "self.made(x)", "self.default(x)",
        )]  # fmt: skip

    def s_view(self) -> list[str]:
        shape = "n, 4, -1" if self.dims == 1 else "n, 4, x.shape[2], -1"
        y = self.new()
        return self.pick(
            ["n = x.shape[0]", f"x = x.view(n, 2, -1).view({shape})"],
            ["n = x.size(0)", f"x = x.reshape(n, -1).reshape({shape})"],
            ["n = x.shape[0]", f"x = torch.flatten(x, 1).reshape({shape})"],
            ["x = x.transpose(-1, -2).transpose(-1, -2)"],
            ["x = x.transpose(1, -1).contiguous().transpose(1, -1)"],
            [f"{y} = x.view(x.shape[0], -1)", f"{y}.mul_(0.5)"],
            [f"{y} = x[:, :2]", f"{y} += 1.0"],
            ["a, b = x.chunk(2, 1)", "x = torch.cat([b, a], 1)"],
            ["a, b = torch.split(x, 2, dim=1)", "x = torch.cat((a * 2, F.relu(b)), dim=1)"],
            ["x = x.as_strided(x.shape, x.stride())"],
            ["x = x.flip(1)"],
            [f"{y} = x.detach()", f"x = x + {y}.abs()"],
            ["n = x.shape[0]", "m = n", "m += 1", f"x = x.reshape({shape}) * m"],
            ["x = x.permute(*range(x.dim()))"],
            [f"{y} = F.relu(x, inplace=True)", f"x = x + {y}"],
            ["x = x.transpose(0, 1).transpose(0, 1)"],
            ["x = x.mT.mT" if self.dims == 2 else "x = x * 1"],
            ["n = x.shape[0]", f"x = F.relu(x.reshape(n, -1).T.reshape(-1, n).T, inplace=True).reshape({shape})"],
        )

    def s_write(self) -> list[str]:
        self.init.append("self.register_buffer('seen', torch.zeros(()))") if not any(
            "'seen'" in line for line in self.init
        ) else None
        return self.pick(
            ["x = x * 1", "x.relu_()"], ["x = x * 1", "x += 0.5"], ["x = x * 1", "x[:, 0] = 0.5"], ["x = x * 1", "x[:, 1] *= 2"],
            ["x += 1.0"], ["x.mul_(2.0)"], ["self.seen.add_(1)", "x = x + self.seen"], ["self.seen += 1", "x = x * self.seen"],
            ["self.calls += 1", "x = x * (1 + self.calls / 8)"], ["self.log.append(x.shape[0])"], ["LOG.append(1)"],
            ["self.last = x"], ["self.table['n'] = x.shape[0]"], ["x = torch.mul(x, 2, out=torch.empty_like(x)) if not x.requires_grad else x"],
            ["self.seen.copy_(x.detach().mean())"], ["x.data.mul_(0.5)"], ["x = x.clamp_(max=1.0) if not x.is_leaf else x"],
        )  # fmt: skip

    def s_dice(self) -> list[str]:
        if self.pick(0, 0, 1):
            self.generator = True
            self.init.append("self.gen = torch.Generator().manual_seed(3)")
            return ["x = x * torch.rand((), generator=self.gen, dtype=x.dtype)"]
        drop = self.layer("nn.Dropout(0.5)", "r")
        return self.pick(
            ["x = x * random.random()"], ["x = x * np.random.rand()"], ["x = x * self.npgen.random()"], ["x = x * self.rnd.random()"],
            ["x = x + torch.rand_like(x)"], [f"x = {drop}(x)"], ["x = F.dropout(x, 0.25, self.training)"], ["x = F.dropout(x)"],
            ["x = x * torch.randn(4, *[1] * (x.dim() - 2), dtype=x.dtype)"], ["if random.random() < 0.5:", "    x = x * 2"],
            [f"x = F.relu({self.conv()}({drop}(x)))"], [f"x = F.relu({drop}({self.conv()}(x)))"], ["x = x * next(self.dice)"],
            ["x = F.dropout(x, 0.5, self.training, True) if not x.is_leaf else x"],
        )  # fmt: skip

    def s_context(self) -> list[str]:
        inner = self.nest([f"x = F.relu({self.conv()}(x))"])
        return self.pick(
            ["with torch.no_grad():", *inner],
            ["with torch.enable_grad():", *inner],
            ["with torch.autocast('cpu', enabled=False):", *inner],
            ["with torch.set_grad_enabled(self.flag):", *inner],
            ["with contextlib.suppress(ZeroDivisionError):", *inner],
            ["try:", *inner, "except RuntimeError:", "    x = x * 2"],
            ["try:", "    x = x.view(1, 2, 3)", "except RuntimeError:", *inner],
            ["try:", *inner, "finally:", "    self.calls += 1"],
            ["if x.shape[0] > 2:", "    raise ValueError('too many')"],
            ["assert x.shape[0] < 3"],
            ["assert x.dim() == 4, 'dims'"],
        )

    def s_other(self) -> list[str]:
        d = self.dims
        gn = self.layer("nn.GroupNorm(2, 4)", "g")
        pool = self.layer(f"nn.{self.pick('MaxPool', 'AvgPool')}{d}d(3, 1, 1)", "p")
        frozen = self.layer(self.bn_text(), "f")
        self.changes += [f"m.{frozen[5:]}.momentum = 0.5"]
        scale = self.new("z")
        self.init.append(f"self.{scale} = nn.Parameter(torch.ones(4, *[1] * {d}))")
        return self.pick(
            [f"x = F.relu({self.conv()}({gn}(x)))"], [f"x = {pool}(F.relu({self.conv()}(x)))"], [f"x = {frozen}(x)"],
            [f"x = {frozen}(F.relu({self.conv()}(x)))"], [f"x = F.relu({self.conv()}(x)) * self.{scale}"],
            [f"x = F.relu({self.conv()}(input=x))"], [f"x = x + F.conv{d}d(x, {self.conv()}.weight.detach()[:, :, :1].sum(-1, True))[:, :4] * 0"],
            [f"x = x * torch.sigmoid(F.relu({self.conv()}(F.adaptive_avg_pool{d}d(x, 1))))"],
            [f"x = F.interpolate(F.relu({self.conv()}(x)), x.shape[2:])"], ["x = torch.where(x > 0, x, x * 0.1)"],
            [f"x = F.max_pool{d}d(F.relu({self.conv()}(x)), 3, 1, 1)"], ["x = x - x.mean((0, -1), keepdim=True)"],
            ["x = F.softmax(x, dim=1)"], ["x = torch.stack([x, x * 2]).sum(0)"], ["x = x.float().to(x.dtype)"],
            [f"x = F.relu({self.conv()}(x)).clamp(max=1.0)"], ["x = F.batch_norm(x, self.mean, self.var, training=self.training)"],
            [f"y = {self.conv()}(x)", "x = torch.maximum(y, x)"], [f"y = F.relu({self.conv()}(x))", "x = y * y.mean()"],
            ["y, i = x.max(1, keepdim=True)", "x = x * y"], ["k = ''.join(['ga', 'in'])", "x = x * getattr(self, k)"],
        )  # fmt: skip

    def s_python(self) -> list[str]:
        """What trips those who follow Python only nearly."""
        conv = self.conv()
        return self.pick(
            ["g = (k for k in (0.5, 1.5))", "x = x * sum(g)", "x = x + sum(g)"],
            ["k = 1.0", "g = (k * j for j in (1.0, 2.0))", "k = 0.5", f"x = F.relu({conv}(x)) * sum(g)"],
            ["pairs = zip((1.0, 2.0), (3.0, 4.0))", "for a, b in pairs:", "    break", f"x = F.relu({conv}(x))", "for a, b in pairs:", "    x = x * a"],
            ["parts = [0.5]", "for k in parts:", "    if len(parts) < 3:", "        parts.append(k + 0.5)", f"    x = F.relu({conv}(x)) * k"],
            ["seen = {'a': 1.0}", "keys = seen.keys()", "seen['b'] = 2.0", f"x = F.relu({conv}(x)) * len(list(keys))"],
            [f"steps = [lambda v: {conv}(v), F.relu]", "for step in steps:", "    x = step(x)"],
            [f"x = any(self.bump(x, k) for k in (1, 2)) and F.relu({conv}(x))"],
            ["a = b = [x]", f"a += [F.relu({conv}(x))]", "x = b[-1] * len(b)"],
            ["a, *rest = 1.0, 2.0, 3.0", f"x = F.relu({conv}(x)) * rest[-1]"],
            ["k = 0.5", "ks = [k for k in (1.0, 2.0)]", f"x = F.relu({conv}(x)) * k"],
            ["__k = 0.5", f"x = F.relu({conv}(x)) * __k"],
            [f"x = F.relu({conv}(x)) * self.__private"],
            ["name = 'h{}'.format(x.shape[0])", f"x = F.relu({conv}(x)) * getattr(self, name, 0.5)"],
            ["found = {}", f"found[len(found)] = F.relu({conv}(x))", "x = found.pop(0)"],
            ["for k in range(2):", "    if k == 1 and self.flag:", "        continue", f"    x = F.relu({conv}(x))", "else:", "    x = x * 0.5"],
            ["s = x.shape", "t = s", "t += (1,)", f"x = F.relu({conv}(x)).view(t).squeeze(-1)"],
            [f"x = (F.relu({conv}(x)) if self.flag else x) if self.training else {conv}(x)"],
            ["y = x", "y = y @ torch.ones(x.shape[-1], x.shape[-1], dtype=x.dtype)", f"x = F.relu({conv}(x)) + y"],
            ["y = x * 1", "z = y", "z @= torch.ones(x.shape[-1], x.shape[-1], dtype=x.dtype)", f"x = F.relu({conv}(y)) + z"],
            [f"x = F.relu({conv}(x))", "del y if False else None"][:1],
        )  # fmt: skip

    def nest(self, lines: list[str]) -> list[str]:
        return ["    " + line for line in lines]

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
        """Take back the layers of the choices that were not taken."""
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


class Made:
    """One twin of a program: its namespace and model."""

    def __init__(self, program: Program, name: str) -> None:
        self.filename = f"<program {name}>"
        if program.shown:
            lines = program.text.splitlines(keepends=True)
            linecache.cache[self.filename] = (len(program.text), None, lines, self.filename)
        self.dtype = torch.float32 if program.float32 else torch.float64
        self.scope: dict[str, Any] = {"__name__": "programs_made", "DTYPE": self.dtype}
        exec(program_head.CODE, self.scope)
        exec(compile(program.text, self.filename, "exec", dont_inherit=True), self.scope)
        torch.manual_seed(1)
        self.model: nn.Module = self.scope["Program"]().to(self.dtype)
        with torch.no_grad():
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=0.5)
                    module.running_mean.normal_(std=0.5)  # type: ignore[union-attr, operator]
                    module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]

    def forget(self) -> None:
        linecache.cache.pop(self.filename, None)


def input_of(program: Program, step: Step) -> Tensor:
    """The input of a step, as a leaf."""
    generator = torch.Generator().manual_seed(step.seed)
    dtype = torch.float32 if program.float32 else torch.float64
    if step.dtype == "other":
        dtype = torch.float64 if program.float32 else torch.float32
    shape = (step.batch, 4, *[step.length] * program.dims)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if step.layout == "channels-last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif step.layout == "transposed":
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    elif step.layout == "sliced":
        x = torch.cat([x, x], 1)[:, :4]
    elif step.layout == "expanded" and step.batch:
        x = x[:1].expand(shape)
    return x.requires_grad_(step.requires_grad)


def once(module: nn.Module) -> None:
    """A hook that removes itself."""
    handle = module.register_forward_hook(lambda s, a, out: (handle.remove(), out * 3)[1])


def flips(module: nn.Module, root: Any) -> None:
    """A hook on one module that flips a flag of another."""

    def hook(s: nn.Module, a: Any, out: Any) -> None:
        root.flag = not root.flag

    module.register_forward_hook(hook)


def write(rng: random.Random) -> Program:
    """A random program."""
    return Writer(rng).program()
