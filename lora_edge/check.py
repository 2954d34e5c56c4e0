"""``lora-edge check``: shows what is installed and which backends are available, and why others are not, and tests their ops.

Every op of every available backend runs here, forward and backward, against :mod:`lora_edge.ops.reference` in float64.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_edge import ops
from lora_edge._version import VERSION
from lora_edge.environment import extension as _extension
from lora_edge.ops import reference
from lora_edge.ops.backends import AVAILABLE, backends
from lora_edge.ops.engines import registry as engines
from lora_edge.tt import contract_suffix, tt_svd

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # ||a - b|| / ||b||, of value and gradients
TF32_TOLERANCE = 1e-3


class Case(NamedTuple):
    """The sizes of one call ``y = tt_block(x (N, I, *size), ...)``, which tests tt_conv, tt_fuse and dora_fuse too."""

    name: str
    channels: int
    outputs: int
    kernel: tuple[int, ...]
    size: tuple[int, ...]
    stride: int = 1
    padding: int | str = 0
    groups: int = 1
    rank: int = 2
    batch: int = 3
    channels_last: bool = False


CASES = [
    Case("1-D", 6, 24, (8,), (50,), padding="same"),  # T-ResNet's first layer
    Case("1-D of 97 channels, stride 2", 97, 33, (5,), (40,), stride=2, padding=2),
    Case("2-D", 16, 32, (3, 3), (17, 13), padding=1),
    Case("2-D in channels-last, stride 2", 32, 64, (3, 3), (16, 16), stride=2, padding=1, rank=4, channels_last=True),
    Case("1x1 in channels-last", 64, 40, (1, 1), (9, 11), channels_last=True),
    Case("depthwise", 16, 16, (3, 3), (12, 10), padding=1, groups=16, rank=1),
    Case("groups", 12, 18, (3, 3), (10, 9), padding=1, groups=3),
]


class Outcome(NamedTuple):
    """The largest relative error over an op's value and gradients, or in ``text`` why the op was refused or failed."""

    title: str
    error: float
    tolerance: float
    text: str = ""

    @property
    def passed(self) -> bool:
        return not self.text and self.error <= self.tolerance


def check(show: Callable[[str], None] = print) -> bool:
    """Show versions, devices and backends, test every op, and return whether all passed."""
    for line in about():
        show(line)
    found = backends()
    passed = failed = 0
    for name, state in found.items():
        show(f"\nbackend {name}: {state}")
        if state != AVAILABLE:
            continue
        with nullcontext() if name != "triton" else _without_tuning(show):
            for outcome in check_backend(name):
                passed, failed = passed + outcome.passed, failed + (not outcome.passed)
                measured = outcome.text or f"error {outcome.error:.1e}, at most {outcome.tolerance:.0e}"
                show(f"  {'pass' if outcome.passed else 'FAIL'}  {outcome.title}: {measured}")
    show(f"\n{passed} of {passed + failed} checks passed")
    return failed == 0


def _without_tuning(show: Callable[[str], None]) -> AbstractContextManager[None]:
    """Keep Triton from tuning its kernels for the tests' small shapes, which would take minutes more."""
    from lora_edge.ops.engines.triton.kernels import tuner

    show("  each kernel is compiled at its first call, which takes minutes, once")
    return tuner.without_measuring()


def about() -> Iterator[str]:
    """Yield lines about versions, the driver, the devices and the build of the extension."""
    yield f"lora_edge {VERSION}, Python {platform.python_version()}, {platform.platform()}"
    cuda = "without CUDA" if torch.version.cuda is None else f"built with CUDA {torch.version.cuda}"
    triton = importlib.util.find_spec("triton") and _version("triton")
    yield f"torch {torch.__version__} {cuda}; triton {triton or 'missing'}"
    if (why := _extension.reason()) is not None:
        yield f"extension: {why}"
        return
    module = _extension.load()
    build, found = module.build_info(), module.device_info()
    made = f"CUDA {build['cuda']} for {build['architectures']}" if build["cuda"] else "no CUDA"
    yield f"extension: built with {made}, {build['compiler']}; on the CPU by {build['cpu']}"
    yield f"driver: {'none' if found['driver'] is None else 'supports CUDA up to ' + found['driver']}"
    yield from ([] if found["error"] is None else [f"device: none; {found['error']}"])
    for device in found["devices"]:
        yield (
            f"device: {device['name']}, capability {device['capability']}, {device['multiprocessors']} SMs, "
            f"{device['memory'] / 2**30:.1f} GiB"
        )
    if build["cuda"] and found["driver"] and _numbers(found["driver"]) < _numbers(build["cuda"]):
        yield (
            f"hint: the driver supports CUDA {found['driver']}, the extension was built with {build['cuda']}; "
            f"reinstall lora_edge with the CUDA {found['driver']} toolkit, or update the driver"
        )


def check_backend(backend: str) -> Iterator[Outcome]:
    """Every op on every case and dtype that the backend supports."""
    device, engine = torch.device(engines.device_type(backend)), engines.engine(backend)
    dtypes = [(torch.float32, False), *[(torch.float32, True)] * engine.TF32, *((d, False) for d in engine.DTYPES[1:])]
    runs = [("tt_fuse", _fuse), ("dora_fuse", _dora), ("tt_conv", _conv), ("tt_block", _block)]
    runs = [(op, run) for op, run in runs if engines.leaves(backend, op, True, False) is None]
    cases = [case for case in CASES if engine.GROUPS or case.groups == 1]
    for dtype, tf32 in dtypes:
        unit = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        for case in cases:
            for op, run in runs:
                yield _outcome(f"{op} {case.name}, {unit}", backend, case, device, dtype, tf32, run)


def _outcome(
    title: str, backend: str, case: Case, device: torch.device, dtype: torch.dtype, tf32: bool, run: Callable[..., Tensor]
) -> Outcome:
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCE[dtype]
    tensors = _tensors(case, device, dtype)
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    want = run(reference, case, exact)
    dy = torch.randn(want.shape, dtype=torch.float64, device=device)
    if run is _block:  # next to the activation's corner, rounding decides the derivative
        dy = dy.where(_block(reference, case, exact, activation=None).abs() > 0.1, 0.0)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        y = run(ops, case, tensors, backend=backend)
        inputs = [name for name, t in tensors.items() if t.requires_grad]
        got = torch.autograd.grad(y, [tensors[name] for name in inputs], dy.to(dtype), allow_unused=True)
    except RuntimeError as error:  # failing launches are what this command looks for
        return Outcome(title, float("inf"), tolerance, str(error).splitlines()[0])
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    expected = torch.autograd.grad(want, [exact[name] for name in inputs], dy.to(dtype).double(), allow_unused=True)
    pairs = [(y, want), *((a, b) for a, b in zip(got, expected, strict=True) if b is not None)]
    return Outcome(title, max(_relative_error(a, b) for a, b in pairs), tolerance)


def _tensors(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the inputs of every op, the same on every machine; trainable ones require a gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=generator)

    taps = case.channels // case.groups
    for k in case.kernel:
        taps *= k
    weight = normal(case.outputs, case.channels // case.groups, *case.kernel, size=taps**-0.5)
    suffix = contract_suffix(tt_svd(weight, case.rank)[1:])
    x = normal(case.batch, case.channels, *case.size)
    core = normal(case.outputs, suffix.shape[0], size=0.3)
    tensors = {
        "x": x.to(memory_format=torch.channels_last) if case.channels_last else x,
        "weight": weight,
        "core": core,
        "suffix": suffix,
        "bias": normal(case.outputs),
        "residual": normal(*reference.tt_conv(x, weight, core, suffix, **_conv_arguments(case)).shape),
        "a": torch.rand(case.outputs, generator=generator) + 0.5,
        "b": normal(case.outputs),
        "trained suffix": normal(*suffix.shape, size=taps**-0.5),
        "magnitude": torch.rand(case.outputs, generator=generator) + 0.5,
    }
    found = {name: t.to(device, dtype) for name, t in tensors.items()}
    for name in ("x", "core", "bias", "residual", "trained suffix", "magnitude"):
        found[name].requires_grad_()
    return found


def _conv_arguments(case: Case) -> dict[str, Any]:
    return {"stride": case.stride, "padding": case.padding, "groups": case.groups}


def _fuse(ops: ModuleType, case: Case, t: dict[str, Tensor], **options: Any) -> Tensor:
    return ops.tt_fuse(t["weight"], t["core"], t["suffix"], 0.7, **options)


def _dora(ops: ModuleType, case: Case, t: dict[str, Tensor], **options: Any) -> Tensor:
    return ops.dora_fuse(t["weight"], t["core"], t["trained suffix"], t["magnitude"], 0.7, **options)


def _conv(ops: ModuleType, case: Case, t: dict[str, Tensor], **options: Any) -> Tensor:
    arguments = (t["x"], t["weight"], t["core"], t["suffix"], t["bias"])
    return ops.tt_conv(*arguments, scale=0.7, **_conv_arguments(case), **options)


def _block(ops: ModuleType, case: Case, t: dict[str, Tensor], **options: Any) -> Tensor:
    arguments = (t["x"], t["weight"], t["core"], t["suffix"], t["bias"])
    epilogue = {"affine": (t["a"], t["b"]), "residual": t["residual"], "activation": "relu", **options}
    return ops.tt_block(*arguments, scale=0.7, **_conv_arguments(case), **epilogue)


def _relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-300))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))
