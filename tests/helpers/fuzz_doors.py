"""Random calls at the three doors to compiled code: Python's ops and layers, the extension ``_C``, torch's custom operators.

    python tests/helpers/fuzz_doors.py ops 150 --seed 0

Each call is valid, or valid with one thing changed: a shape, dtype, stride, size, number or address. It must end in an ordinary
error or in the reference's value. A crash or a hang ends the process, so ``test_doors.py`` runs this in a separate one. Sizes
beyond 32 bits are expanded tensors or plain numbers, so nothing large is allocated.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lora_edge
from helpers.fuzz_calls import Call, Launch, another, cpu_takes
from lora_edge import ops
from lora_edge.environment.extension import load

ERRORS = (ValueError, TypeError, RuntimeError, KeyError, OSError)
OPS_OF_PLANS = tuple(
    f"{op}_{direction}" for op in ("tt_fuse", "dora_fuse", "tt_block") for direction in ("forward", "backward")
)
WILD = (-1, 0, 1, 2, 3, 7, 31, 2**15, 2**16 + 1, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, -(2**31), -(2**63))


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want).norm() / want.norm().clamp_min(1e-30))


def near(got: Tensor, want: Tensor, what: str) -> None:
    """Within 1e-5 in relative norm: 20 times the engine's own 0.5e-6 (csrc/cpu/product.h), for sums that cancel."""
    assert got.shape == want.shape, (what, got.shape, want.shape)
    assert not want.norm() or relative_error(got, want) <= 1e-5, (what, relative_error(got, want))


def attempt(call: Callable[[], Any], counts: Counter[str]) -> Any:
    """The call's value, None where it ends in an ordinary error."""
    try:
        value = call()
    except ERRORS as error:
        counts[type(error).__name__] += 1
        return None
    counts["value"] += 1
    return value


def ops_door(dice: random.Random, counts: Counter[str]) -> None:
    """Every public op, and adapted layers whose tensors are replaced, before or after forward."""
    call = Call(dice)
    y, gradients = call.want()
    kind = dice.randrange(4)
    if kind == 0:  # valid: values and gradients
        positional, options = call.arguments()
        leaves = {i: positional[i].clone().requires_grad_() for i in (0, 2, 4) if positional[i] is not None}
        if options["residual"] is not None:
            leaves[-1] = options["residual"] = options["residual"].clone().requires_grad_()
        backend = dice.choice(("cpu", "auto")) if cpu_takes(call) else "auto"
        got = ops.tt_block(*[leaves.get(i, t) for i, t in enumerate(positional)], **options, backend=backend)
        near(got, y, "y")
        found = torch.autograd.grad(got, list(leaves.values()), call.dy)
        for leaf, gradient in zip(leaves, found, strict=True):
            near(gradient, gradients[{0: 0, 2: 1, 4: 2, -1: 3}[leaf]], f"gradient {leaf}")
        counts["value"] += 1
        return
    if kind == 3:
        layer_with_another_tensor(dice, counts)
        return
    name = dice.choice((*call.tensors, "stride", "padding", "dilation", "groups", "scale"))
    large = False
    if name in call.tensors:
        call.tensors[name] = another(dice, call.tensors[name])
        large = isinstance(call.tensors[name], Tensor) and call.tensors[name].numel() > 2**24
    elif name == "scale":
        call.scale = dice.choice((float("nan"), 1e300, -1.0))
    else:
        setattr(call, name, dice.choice(WILD))
        large = True  # torch may allocate what the numbers say
    positional, options = call.arguments()
    backend = "cpu" if large else dice.choice(("cpu", "auto"))
    op = dice.choice(("tt_block", "tt_conv", "tt_fuse", "dora_fuse"))
    magnitude = call.tensors["bias"]

    def run() -> Any:
        if op == "tt_fuse":
            return ops.tt_fuse(*positional[1:4], backend="cpu")
        if op == "dora_fuse":
            return ops.dora_fuse(*positional[1:4], magnitude, backend=dice.choice(("torch", "cpu")))
        if op == "tt_conv":
            return ops.tt_conv(*positional, backend=backend)
        value = ops.tt_block(*positional, **options, backend=backend)
        if value.requires_grad:
            value.sum().backward()
        return value

    if positional[2] is not None and isinstance(positional[2], Tensor) and positional[2].is_floating_point():
        positional = (*positional[:2], positional[2].detach().requires_grad_(), *positional[3:])
    attempt(run, counts)


def layer_with_another_tensor(dice: random.Random, counts: Counter[str]) -> None:
    channels = dice.choice((3, 8, 17))
    model = nn.Sequential(
        nn.Conv1d(channels, 24, 3, padding=1),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.Conv1d(24, 16, 3, padding=1),
        nn.BatchNorm1d(16),
        nn.ReLU(),
    )
    model = lora_edge.adapt(model, rank=dice.randint(1, 4))
    layer = dice.choice([m for m in model.modules() if hasattr(m, "core")])
    norm = dice.choice([m for m in model.modules() if isinstance(m, nn.BatchNorm1d)] or [layer])
    owner, name = dice.choice(
        ((layer, "core"), (layer, "suffix"), (layer, "weight"), (layer, "bias"), (norm, "running_var"), (norm, "weight"))
    )
    tensor = getattr(owner, name, None)
    x = torch.randn(dice.choice((1, 4)), channels, 20, requires_grad=True)
    late = dice.random() < 0.5

    def replace() -> None:
        changed = another(dice, tensor.detach())
        alone = owner is norm and isinstance(changed, Tensor) and changed.numel() > 2**24  # torch computes on it before the op
        if isinstance(changed, Tensor) and not alone:
            tensor.data = changed

    def run() -> Any:
        if not late:
            replace()
        y = model(x)
        if late:
            replace()
        y.sum().backward()
        return y

    if isinstance(tensor, Tensor):
        attempt(run, counts)


def extension_door(dice: random.Random, counts: Counter[str]) -> None:
    """``_C``: every field of a plan and every number of a launch. An address that is not 0 is always a tensor's."""
    call = Call(dice)
    y, gradients = call.want()
    launch = Launch(call, backward=False)
    kind = dice.randrange(5)
    if kind == 0:  # valid: forward, then backward on what it saved
        launch.run(threads=dice.choice((1, 2, 5)))
        near(launch.held["y"].reshape(y.shape), y, "y")
        back = Launch(call, backward=True)
        for name in ("h", "bits"):
            if back.held[name] is not None:
                back.held[name].copy_(launch.held[name])
        back.run(threads=dice.choice((1, 2, 5)))
        near(back.held["dx"].reshape(gradients[0].shape), gradients[0], "dx")
        if gradients[1] is not None:
            near(back.held["dcore"], gradients[1], "dcore")
        if gradients[2] is not None:
            near(back.held["dbias"], gradients[2], "dbias")
        if gradients[3] is not None:
            near(back.held["dresidual"].reshape(gradients[3].shape), gradients[3], "dresidual")
        counts["value"] += 1
        return
    launch = Launch(call, backward=dice.random() < 0.5)
    if kind in (1, 2):  # another plan on the same tensors
        field = dice.choice(list(launch.fields))
        was = launch.fields[field]
        near_by = (was + 1, was - 1, was * 2, was + 8, was * 3) if not isinstance(was, float) else (float("nan"), 1e300, -1.0)
        launch.fields[field] = dice.choice((*WILD, *near_by, *near_by, 0.5, None, True, "1"))
        if dice.random() < 0.3:
            other = dice.choice(list(launch.fields))
            launch.fields[other] = dice.choice(WILD)

        def ask() -> Any:
            plan = load().Plan(**launch.fields)
            plan.refusal("tt_fuse"), plan.refusal("dora_fuse"), plan.refusal("tt_block"), plan.scratch(), plan.cpu_refusal()
            return plan.cpu_scratch()

        attempt(ask, counts)
        attempt(launch.run, counts)
    elif kind == 3:  # another number in the launch
        names = list(launch.numbers)
        for _ in range(dice.choice((1, 1, 2))):
            name = dice.choice(names)
            was, address = launch.numbers[name], f"{name}_bytes" in launch.numbers
            if address:
                launch.numbers[name] = dice.choice((0, 1, was + 1, -was, 0))  # 1 and was + 1 are not the address of a float
                if name in ("bits",) and launch.numbers[name] != 0:
                    launch.numbers[name] = 0
            else:
                smaller = (was - 1, was // 2, 0, -was, -(2**63), 2**63)
                larger = () if name.endswith("_bytes") else (was + 1, 2 * was, 2**20, 2**31, 2**40, 2**62)
                launch.numbers[name] = dice.choice((*smaller, *larger))
        attempt(launch.run, counts)
    else:
        values = tuple(launch.numbers.values())
        wrong = dice.choice(
            (values[:-1], (*values, 0), list(values), (None, *values[1:]), (0.5, *values[1:]), (0,) * len(values), None)
        )
        which = dice.random()
        if which < 0.3:
            attempt(lambda: launch.run(threads=dice.choice((*WILD, None, 1.0))), counts)
        elif which < 0.6:
            attempt(lambda: launch.run(numbers=wrong), counts)
        else:
            plan, op = (
                load().Plan(**launch.fields),
                dice.choice(OPS_OF_PLANS),
            )
            attempt(
                lambda: getattr(plan, op)((0,) * len(load().call_fields(op)), dice.choice((0, *WILD)), dice.choice((0, *WILD))),
                counts,
            )


def operators_door(dice: random.Random, counts: Counter[str]) -> None:
    """``torch.ops.lora_edge``: forward and backward with any tensor or number replaced."""
    from lora_edge.ops import custom_ops  # noqa: F401  (registers them)

    call = Call(dice)
    y, gradients = call.want()
    t = call.tensors
    dims = t["weight"].dim() - 2
    factors = [] if t["suffix"] is None else [t["suffix"]]
    saves = (t["core"] is not None, call.activation is not None)
    layer = [
        "cpu",
        [call.stride] * dims,
        [call.padding] * 2 * dims,
        [call.dilation] * dims,
        call.groups,
        call.scale,
        call.activation,
        0.0,
        0.0,
        None,
        *saves,
    ]
    forward = [t["x"], t["weight"], t["core"], t["bias"], t["residual"], factors, t["a"], t["b"], None, None, *layer]
    got, saved = torch.ops.lora_edge.tt_block(*forward)
    near(got, y, "y")
    needs = [True, t["core"] is not None, t["bias"] is not None, t["residual"] is not None]
    backward = [call.dy, saved, t["weight"], t["core"], factors, t["a"], None, list(t["x"].shape), False, needs, *layer]
    found = torch.ops.lora_edge.tt_block_backward(*backward)
    for name, need, g, w in zip(("dx", "dcore", "dbias", "dresidual"), needs, found, gradients, strict=True):
        if need:
            near(g, w, name)
    which = dice.randrange(4)
    if which == 3:
        arguments = [t["weight"], t["core"], factors, dice.choice(("cpu", "cuda", "triton", "x")), 1.0]
        op = dice.choice((torch.ops.lora_edge.tt_fuse, torch.ops.lora_edge.tt_fuse_backward))
        if dice.random() < 0.5:
            operands = [t["weight"], t["core"], t["suffix"], t["bias"]]
            op, arguments = torch.ops.lora_edge.dora_fuse, [*operands, *arguments[3:]]
            if dice.random() < 0.5:
                needs = [dice.random() < 0.5 for _ in range(3)]
                op = torch.ops.lora_edge.dora_fuse_backward
                arguments = [t["weight"], *operands, t["bias"], needs, *arguments[4:]]
    else:
        arguments, op = (
            (forward, torch.ops.lora_edge.tt_block) if which == 0 else (backward, torch.ops.lora_edge.tt_block_backward)
        )
    for at in dice.sample(range(len(arguments)), dice.choice((1, 1, 2))):
        change_one(dice, arguments, at)
    attempt(lambda: op(*arguments), counts)


def change_one(dice: random.Random, arguments: list[Any], at: int) -> None:
    was = arguments[at]
    if isinstance(was, Tensor):
        arguments[at] = another(dice, was)
    elif isinstance(was, bool):
        arguments[at] = not was
    elif isinstance(was, list) and was and isinstance(was[0], Tensor):
        arguments[at] = dice.choice(([], [another(dice, was[0])], [was[0], was[0]], [torch.randn(2, 2, 2)] * 3))
    elif isinstance(was, list):
        changed = list(was)
        if changed:
            changed[dice.randrange(len(changed))] = dice.choice((*WILD, True))
        arguments[at] = dice.choice((changed, changed, [], was[:-1], [*was, 1]))
    elif isinstance(was, int):
        arguments[at] = dice.choice(WILD)
    elif isinstance(was, float):
        arguments[at] = dice.choice((float("nan"), float("inf"), 1e300, 2))
    elif isinstance(was, str):
        arguments[at] = dice.choice(("cuda", "triton", "torch", "", "hardtanh", "leaky_relu", "relu"))
    else:
        arguments[at] = dice.choice((torch.randn(3), torch.float16, torch.int32, "relu", 1))


DOORS = {"ops": ops_door, "extension": extension_door, "operators": operators_door}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("door", choices=DOORS)
    parser.add_argument("calls", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the call to begin with")
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    counts: Counter[str] = Counter()
    for number in range(options.first, options.calls):
        dice = random.Random(f"{options.seed} {options.door} {number}")
        torch.manual_seed(number)
        print(number, end="\r", file=sys.stderr, flush=True)  # after a crash the last number names the call
        DOORS[options.door](dice, counts)
    print(f"{options.door}: {options.calls} calls of seed {options.seed}: {dict(counts)}")


if __name__ == "__main__":
    main()
