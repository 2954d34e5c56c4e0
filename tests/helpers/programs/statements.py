"""The statements of a program's forward. Maps stay at ``(N, 4, *L)``, so that statements can follow each other in any order."""

from __future__ import annotations

from helpers.programs.layers import Layers


class Statements(Layers):
    """Each ``s_`` method gives lines that set ``x``, with the layers that they need."""

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
        """Python semantics that an approximate evaluator gets wrong."""
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
