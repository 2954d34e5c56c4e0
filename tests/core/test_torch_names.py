"""What the package uses of torch exists in torch 2.4, or has a fallback in ``lora_edge/environment/torch_private.py``."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_edge
from helpers.networks import network
from helpers.torch_names import Names, defined_names, newer_names
from lora_edge.environment import torch_private
from lora_edge.ops import dispatch

PACKAGE = Path(lora_edge.__file__).parent
BENCHMARKS = PACKAGE.parent / "benchmarks"
# Private names in use outside of torch_private.py, with the version since which they exist, so that none needs a fallback;
# "2.0" stands for 2.0 or older. A name that is newer than 2.4 belongs in torch_private.py.
SINCE = {
    # modules
    "torch._subclasses.fake_tensor.FakeTensorMode": "2.0",
    "torch.nn.modules.batchnorm._BatchNorm": "2.0",
    "torch.nn.modules.conv._ConvNd": "2.0",
    "torch.nn.modules.dropout._DropoutNd": "2.0",
    "torch.nn.modules.padding._ConstantPadNd": "2.0",
    "torch.nn.modules.pooling._AdaptiveMaxPoolNd": "2.0",
    "torch.utils._python_dispatch.TorchDispatchMode": "2.0",
    "torch.utils._pytree.tree_leaves": "2.2",
    # of nn.Module
    "torch.nn.Module._call_impl": "2.0",
    "._apply": "2.0",
    "._reset_parameters": "2.0",
    "._backward_hooks": "2.0",
    "._backward_pre_hooks": "2.0",
    "._buffers": "2.0",
    "._forward_hooks": "2.0",
    "._forward_pre_hooks": "2.0",
    "._load_from_state_dict": "2.0",
    "._modules": "2.0",
    "._non_persistent_buffers_set": "2.0",
    "._orig_mod": "2.0",
    "._parameters": "2.0",
    # of convolutions and BatchNorm
    "._check_input_dim": "2.0",
    "._conv_forward": "2.0",
    "._reversed_padding_repeated_twice": "2.0",
    # of tensors and storages
    "._cdata": "2.0",
    "._is_view": "2.0",
    "._version": "2.0",
}


@functools.cache
def sources() -> list[tuple[Path, Names]]:
    files = sorted([*PACKAGE.rglob("*.py"), *BENCHMARKS.rglob("*.py")])
    trees = {file: ast.parse(file.read_text()) for file in files if file.name != "torch_private.py"}
    own = defined_names(trees.values())
    return [(file, Names(tree, own)) for file, tree in trees.items()]


def test_private_names_are_listed_with_their_age():
    used = {}
    for file, names in sources():
        used.update({name: f"{file.relative_to(PACKAGE.parent)}:{line}" for line, name in names.private()})
    unknown = {name: where for name, where in used.items() if not any(name == s or name.startswith(f"{s}.") for s in SINCE)}
    assert not unknown, f"take them in lora_edge/environment/torch_private.py, or list them with their age in SINCE: {unknown}"
    assert all(tuple(map(int, since.split("."))) <= (2, 4) for since in SINCE.values())


@pytest.mark.parametrize("name", SINCE)
def test_listed_name_exists_in_this_torch(name):
    """``make compat`` runs this on the oldest and the newest torch."""
    if name.startswith("torch."):
        place, _, last = name.rpartition(".")
        assert hasattr(nn.Module if place == "torch.nn.Module" else importlib.import_module(place), last)
    elif name == "._orig_mod":
        assert hasattr(torch.compile(nn.Identity(), backend="eager"), "_orig_mod")
    else:
        one = (
            nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1), nn.MultiheadAttention(2, 1), torch.ones(1), torch.ones(1).untyped_storage(),
        )  # fmt: skip
        assert any(hasattr(thing, name[1:]) for thing in one)


def test_nothing_is_newer_than_torch_2_4():
    newer = newer_names()
    used = [
        f"{file.relative_to(PACKAGE.parent)}:{line}: {name}" for file, names in sources() for line, name in names.newer(newer)
    ]
    assert not used, f"not in torch 2.4; take them in lora_edge/environment/torch_private.py with a fallback: {used}"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch import nn\nnn.modules.module._has_any_global_hook()", "torch.nn.modules.module._has_any_global_hook"),
        ("import torch\nf = getattr(torch._C, '_cuda_getCurrentRawStream', None)", "torch._C._cuda_getCurrentRawStream"),
        ("from torch.nn.modules.utils import _pair", "torch.nn.modules.utils._pair"),
        ("def f(module):\n    return module._non_persistent_buffers_set", "._non_persistent_buffers_set"),
        ("def f(t):\n    return getattr(t, '_base', None)", "._base"),
        ("class C(nn.Module):\n    def _call_impl(self): ...", "._call_impl"),
    ],
)
def test_private_names_are_found(source, name):
    assert name in [found for _, found in Names(ast.parse(source)).private()]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\nif torch.compiler.is_exporting(): pass", "torch.compiler.is_exporting"),
        ("from torch.nn import Buffer", "torch.nn.Buffer"),
        ("import torch as t\nt.accelerator.current_accelerator()", "torch.accelerator"),
        ("from torch import nn\nnn.BatchNorm1d(4, bias=False)", "torch.nn.BatchNorm1d(bias)"),
        ("import torch.nn.functional as F\nF.mse_loss(a, b, weight=w)", "torch.nn.functional.mse_loss(weight)"),
        ("model.set_submodule('a', b)", "torch.nn.Module.set_submodule"),
        ("list(model.modules(remove_duplicate=False))", "torch.nn.Module.modules(remove_duplicate)"),
        ("import torch\nhasattr(torch.backends.cudnn, 'conv')", "torch.backends.cudnn.conv"),
        ("from torch.library import custom_op\ncustom_op('a::b', mutates_args=(), tags=())", "torch.library.custom_op(tags)"),
    ],
)
def test_newer_names_are_found(source, name):
    assert name in [found for _, found in Names(ast.parse(source)).newer(newer_names())]


@pytest.mark.parametrize(
    "source",
    [
        "from torch import nn\nnn.BatchNorm1d(4, affine=False)",
        "model.named_modules(remove_duplicate=False)",
        "[1, 2].index(2)",
        "point._replace(x=1)",
        "class A:\n    def __init__(self):\n        self._values = {}\n    def get(self): return self._values",
        "import torch\nwith torch.no_grad(): torch.is_autocast_enabled('cpu')",
    ],
)
def test_other_names_are_left_alone(source):
    names = Names(ast.parse(source))
    assert not [*names.private(), *names.newer(newer_names())]


GLOBAL_HOOKS = {
    "forward": lambda: nn.modules.module.register_module_forward_hook(lambda *_: None),
    "forward, always": lambda: nn.modules.module.register_module_forward_hook(lambda *_: None, always_call=True),
    "before forward": lambda: nn.modules.module.register_module_forward_pre_hook(lambda *_: None),
    "backward": lambda: nn.modules.module.register_module_full_backward_hook(lambda *_: None),
    "before backward": lambda: nn.modules.module.register_module_full_backward_pre_hook(lambda *_: None),
}


@pytest.fixture(params=["torch's function", "without it"])
def old_or_new(request, monkeypatch):
    """The names of this torch, or the fallbacks for an older one."""
    if request.param == "without it":
        monkeypatch.setattr(torch_private, "_has_any_global_hook", None)


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_global_hooks_are_noticed(kind, old_or_new):
    assert torch_private.has_any_global_hook() is False
    handle = GLOBAL_HOOKS[kind]()
    try:
        assert torch_private.has_any_global_hook() is True
    finally:
        handle.remove()
    assert torch_private.has_any_global_hook() is False


@pytest.mark.parametrize("name", ["1-D", "2-D", "3-D"])
def test_a_lean_model_trains_with_gradients(name, old_or_new):
    """As on JetPack 6, where every lean forward with gradients once raised AttributeError; a global hook sees each call."""
    model, x = network(name)
    lora_edge.adapt(model, 2)
    model.train()(x).square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if n.endswith("core")}
    assert gradients
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        model(x).square().mean().backward()
    finally:
        handle.remove()
    assert len(seen) >= len(list(model.modules()))


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_follows_the_older_setting(allowed, monkeypatch):
    monkeypatch.setattr(torch_private, "_cudnn_conv", None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert torch_private.convolutions_run_in_tf32() is allowed


def test_tf32_follows_the_newer_setting():
    conv = torch_private._cudnn_conv
    if conv is None:
        pytest.skip(f"torch {torch.__version__} has no precision for convolutions alone")
    before = conv.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            conv.fp32_precision = precision
            assert torch_private.convolutions_run_in_tf32() is (precision == "tf32")
    finally:
        conv.fp32_precision = before


def test_without_the_private_function_the_stream_comes_from_the_public_one(monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream", raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: type("Stream", (), {"cuda_stream": 7 + index}))
    assert torch_private.current_stream_reader()(1) == 8


def test_transforms_are_noticed():
    def f(x):
        seen.append(torch_private.is_transformed())
        return x * x

    seen, x = [], torch.ones(2)
    torch.func.vmap(f)(x)
    torch.func.grad(lambda x: f(x).sum())(x)
    torch.func.jvp(f, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        f(x)
    f(x)
    assert seen == [True, True, True, True, False]


def test_constant_when_traced_is_what_torch_marks():
    def ours(): ...
    def theirs(): ...

    assert vars(torch_private.constant_when_traced(ours)) == vars(torch.compiler.assume_constant_result(theirs))


MARKED = [
    (module, name)
    for module in (
        importlib.import_module(f"lora_edge.ops.{m}")
        for m in ("backends", "engines.registry", "engines.cuda.available", "plan")
    )
    for name, function in vars(module).items()
    if hasattr(function, "_dynamo_marked_constant")
]


@pytest.mark.parametrize("backend", ["auto", "torch", "cpu"])
def test_compiling_overwrites_no_global_name(backend):
    """Neither the user's nor the library's: torch 2.4 replaced a global function by its result."""
    mine = dict.fromkeys((name for _, name in MARKED), "mine")
    tensors = [torch.randn(shape) for shape in ((2, 4, 9), (4, 4, 3), (4, 2), (2, 4, 3))]
    scope = {**mine, "ops": lora_edge.ops, "tensors": tensors}
    exec(f"def block(): return ops.tt_block(*tensors, padding=1, backend={backend!r})", scope)
    with contextlib.suppress(RuntimeError):  # the CPU engine is not traced
        torch.compile(scope["block"], backend="eager")()
    assert len(mine) >= 4
    assert {name: scope[name] for name in mine} == mine
    assert all(callable(getattr(module, name)) for module, name in MARKED)
    assert all(callable(value) for name, value in vars(dispatch).items() if name in mine)
    assert lora_edge.ops.tt_block(*tensors, padding=1).shape == (2, 4, 9)
