"""Model surgery: adapt, merge, disabled, trainable_parameters. In place; module identity, names and hooks survive."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lora_edge import blocks, calibration, frozen_bn, lean
from lora_edge.budget import MOST_RANK, parse_budget, spread_ranks
from lora_edge.gradient import captured_energies, leading_gradients
from lora_edge.guarded import guard, unguard
from lora_edge.inputs import leading_inputs
from lora_edge.layers import (
    ADAPTED_CLASS,
    LoRAEdgeConv,
    attach,
    check_adaptable,
    check_suffix,
    detach,
    refuse_computed,
    set_weights,
)
from lora_edge.ops import tt_fuse
from lora_edge.ops.backends import require_backend
from lora_edge.reparametrised import Reparametrisation, bake, reparametrised_layers
from lora_edge.samples import few_inputs, few_samples
from lora_edge.subspace import FROM_BATCHES, SCALINGS, SUBSPACES, gradient_suffix, row_energies, suffix_along, weight_suffix
from lora_edge.tt import check_rank

BN_MODES = ("frozen", "batch")


@dataclass
class AdaptState:
    """What ``adapt`` remembers on the model: plain data, so that it survives deepcopy and pickle."""

    bn: str
    scaling: str
    fingerprint: str
    requires_grad: dict[str, bool]
    left_alone: dict[str, str] = field(default_factory=dict)
    head: str | None = None
    subspace: str = "weight"
    base_head: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    not_fused: dict[str, str] = field(default_factory=dict)


@dataclass
class LayerPlan:
    """How one convolution is adapted: its frozen cores or contracted suffix, and the core (None: zero)."""

    frozen: Tensor | Sequence[Tensor]
    core: Tensor | None = None
    scale: float = 1.0
    bond_cap: int | None = None


def adapt(
    model: nn.Module,
    rank: int = 4,
    *,
    targets: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    params: str | int | None = None,
    subspace: str = "weight",
    batches: Iterable[Any] | None = None,
    scaling: str = "balanced",
    bn: str = "frozen",
    train_head: bool = False,
    lean: bool = True,
    saved_dtype: str | torch.dtype | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Adapt a model's convolutions in place: freeze everything, give each convolution a trained core.

    Right afterwards the output is bit-identical to the base model's (where gradients are needed, fused blocks agree with it
    within 1e-6 in relative norm). Train what :func:`trainable_parameters` yields, then
    call :func:`merge`.

    Args:
        model: any module; its ``nn.Conv1d/2d/3d`` are adapted, subclasses of them are left alone.
        rank: cap of every TT bond, at least 1; without meaning where ``params`` is given.
        targets: dotted names or globs of the convolutions to adapt; None takes all.
        exclude: dotted names or globs to leave out; also of a BatchNorm subclass that cannot be frozen, which is refused else.
        params: a budget of trained parameters in the place of one rank: a share of the model's parameters as "0.5%", the cores'
            bytes as "20kB", or their number. It is spread over the layers as ranks from 1 to 16, by the energy that a further
            rank catches of the gradient where ``batches`` are given, by the weight's squared singular values where not. A
            layer that gets nothing stays frozen, and ``summary`` says so. A trained head does not count.
        subspace: which directions the update may use. "weight": the leading right singular directions of the pre-trained
            kernel, as the paper has it. "input": the principal directions of what each layer reads on ``batches``. "gradient":
            the leading right singular directions of the gradient on ``batches``. "auto" is "weight": in the study neither of
            the other two is ahead of it over all data sets.
        batches: the target's inputs, ``x`` or tuples that start with it; with "gradient" or ``params`` pairs ``(x, y)`` with
            classes, the loss is the cross-entropy then. Equal parts of the first four are used, together as many samples as
            the largest holds. "input" takes one to two training steps, "gradient" three to five at batch 64. BatchNorm is on
            its running statistics, whatever ``bn`` says, so :func:`calibrate_bn` comes first.
        scaling: "balanced" gives the suffix rows one common norm a layer, "paper" leaves the singular values in them.
        bn: "frozen" keeps BatchNorm on its running statistics through ``model.train()`` until ``merge``; "batch" leaves it
            to ``train()`` and ``eval()`` as it was, which saves its input for backward and keeps blocks from being fused. Its
            affine parameters are frozen either way.
        train_head: also train the last ``nn.Linear``.
        lean: run ``conv → BN → (+ residual) → activation`` as one op and the other layers in lean form, so that next to
            nothing is saved for backward; ``summary`` shows what was fused. False leaves all other layers stock.
        saved_dtype: "float16" or "bfloat16" keeps ``h`` in half precision between forward and backward; None in its own.
        backend: "auto", "torch", "cuda" or "triton" for the convolutions of this model; see :mod:`lora_edge.ops.backends`.

    Returns:
        The model.

    Raises:
        TypeError: ``rank`` is no integer, or ``model`` no module.
        ValueError: ``rank`` is below 1, an option is unknown, a name matches nothing, a layer is not supported, ``params`` is
            below the smallest core, ``batches`` is missing, not used or empty, or yields no gradient, NaN or Inf.
        RuntimeError: the model is adapted already, cannot be copied for the gradient, or the named backend does not work here.
        All of them before anything is changed.
    """
    rank = check_rank(rank)
    _check_choice("scaling", scaling, SCALINGS)
    _check_choice("bn", bn, BN_MODES)
    saved = _saved_dtype(saved_dtype)
    require_backend(backend, "adapt")
    _check_choice("subspace", subspace, SUBSPACES)
    if batches is None and subspace in FROM_BATCHES:
        what = "inputs" if subspace == "input" else "pairs (x, y) of the target's inputs and classes"
        raise ValueError(f'subspace="{subspace}" needs batches; give a few {what}')
    if subspace == "auto":
        subspace = "weight"
    elif subspace == "weight" and batches is not None and params is None:
        raise ValueError('batches is given, but subspace="weight" uses it with params only; leave it out, or give one of them')
    names = select(model, targets, exclude, bn)
    budget = None if params is None else parse_budget(params, model)
    head = find_head(model) if train_head else None
    weights: dict[str, Tensor] = {}
    for name in names:
        conv = model.get_submodule(name)
        with _named(name):
            check_adaptable(conv)  # type: ignore[arg-type]
        weights[name] = conv.weight  # type: ignore[assignment]
    ranks, suffixes = _choose(model, weights, rank, budget, subspace, batches, scaling, backend)
    plans = {name: LayerPlan(suffix, bond_cap=ranks[name]) for name, suffix in suffixes.items()}
    install(
        model, plans, scaling=scaling, bn=bn, head=head, lean_layers=lean, saved_dtype=saved, backend=backend,
        subspace=subspace,
    )  # fmt: skip
    state = adapt_state(model)
    assert state is not None
    state.left_alone.update({name: f"params={params!r} holds no rank for it, frozen" for name in names if name not in plans})
    return model


def _choose(
    model: nn.Module,
    weights: dict[str, Tensor],
    rank: int,
    budget: int | None,
    subspace: str,
    batches: Iterable[Any] | None,
    scaling: str,
    backend: str,
) -> tuple[dict[str, int], dict[str, list[Tensor]]]:
    """Rank and frozen cores ``[G2, ..., Gd]`` of every adapted layer. Touches neither the model nor torch's generator."""
    cap = rank if budget is None else MOST_RANK
    rows: dict[str, Tensor] = {}  # that the suffixes are made of, where not of the weights
    energies: dict[str, Tensor] = {}

    def suffix(name: str, own: int) -> list[Tensor]:
        with _named(name):
            if not rows:
                return weight_suffix(weights[name], own, scaling)
            make = gradient_suffix if subspace == "gradient" else suffix_along
            return make(weights[name], rows[name], own, scaling)

    if batches is not None:
        device = next(iter(weights.values())).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            needs_labels = subspace == "gradient" or budget is not None
            samples = few_samples(batches, device) if needs_labels else []
            if subspace == "gradient":
                rows = leading_gradients(model, list(weights), cap, samples, backend)
            elif subspace == "input":
                inputs = [x for x, _ in samples] if needs_labels else few_inputs(batches, device)
                rows = leading_inputs(model, list(weights), cap, inputs)
            if budget is not None and subspace != "gradient":
                energies = captured_energies(model, {name: suffix(name, cap) for name in weights}, samples, backend)
    if budget is None:
        ranks = dict.fromkeys(weights, rank)
    else:
        energies = energies or {name: row_energies(tensor, cap) for name, tensor in (rows or weights).items()}
        ranks = spread_ranks(energies, {name: len(weight) for name, weight in weights.items()}, budget)
    suffixes = {name: suffix(name, own) for name, own in ranks.items()}
    return ranks, suffixes


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """A ValueError inside says which layer it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{layer or 'model'}: {error}") from None


def install(
    model: nn.Module,
    plans: dict[str, LayerPlan],
    *,
    scaling: str = "balanced",
    bn: str = "frozen",
    head: str | None = None,
    lean_layers: bool = True,
    saved_dtype: torch.dtype | None = None,
    backend: str = "auto",
    subspace: str = "weight",
) -> nn.Module:
    """Carry out :func:`adapt` for layers whose suffixes are known; ``load_adapter`` uses it as well."""
    if adapt_state(model) is not None or any(isinstance(m, LoRAEdgeConv) for m in model.modules()):
        raise RuntimeError("the model is adapted already; merge it first, or adapt a fresh copy of the base model")
    for name, plan in plans.items():
        check_suffix(model.get_submodule(name).weight, plan.frozen)  # type: ignore[arg-type]
    state = AdaptState(
        bn=bn,
        scaling=scaling,
        fingerprint=fingerprint(model),
        requires_grad={name: p.requires_grad for name, p in model.named_parameters()},
        left_alone=_left_alone(model, bn),
        head=head,
        subspace=subspace,
    )
    model.requires_grad_(False)
    for name, plan in plans.items():
        conv = model.get_submodule(name)
        conv.__class__ = ADAPTED_CLASS[type(conv)]
        attach(conv, plan.frozen, plan.core, plan.scale, plan.bond_cap, scaling, saved_dtype, backend, subspace)  # type: ignore[arg-type]
    for _, norm in calibration.batch_norms(model):
        if bn == "frozen" and frozen_bn.why_not_frozen(norm) is None:
            frozen_bn.freeze_bn(norm, lean_layers)
        else:
            calibration.remember_statistics(norm)
    if head is not None:
        linear = model.get_submodule(head)
        state.base_head = {n: p.detach().cpu().clone() for n, p in linear.named_parameters()}
        linear.requires_grad_(True)
    if lean_layers:
        state.left_alone.update(lean.make_lean(model, backend))
        fused = blocks.fuse(model)
        state.blocks, state.not_fused = fused.blocks, fused.reasons
    guard(model)
    model._lora_edge = state  # type: ignore[assignment]
    return model


def merge(model: nn.Module) -> nn.Module:
    """Fuse every update into its dense kernel, in place; plain ``nn.Conv*`` again, at the base model's cost.

    It takes models of :func:`adapt` and those whose convolutions a method of :mod:`lora_edge.methods` reparametrised. The
    update is fused in float32 with one final cast. Module types, names, order of keys, training flags and
    ``requires_grad`` are those of the original model; a trained head and calibrated statistics stay.

    Returns:
        The model.

    Raises:
        RuntimeError: the model is not adapted, or a layer's weight is computed from other tensors since ``adapt``. Both before
            anything is changed.
    """
    model, state, layers = require_adapted(model)
    refuse_computed(layers)
    unguard(model)
    bake(model)
    with torch.no_grad():
        set_weights({m: tt_fuse(m.weight, m.core, m.suffix, m.scale, backend="torch") for m in layers.values()})
    for layer in layers.values():
        detach(layer)
        if state is None:  # built as a LoRAEdge layer, not adapted: a stock layer's parameters are trainable
            layer.requires_grad_(True)
    for _, norm in calibration.batch_norms(model):
        calibration.forget_statistics(norm)
        if isinstance(norm, frozen_bn.FrozenNorm):
            frozen_bn.unfreeze_bn(norm)
    blocks.unfuse(model)
    lean.make_stock(model)
    if state is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(state.requires_grad.get(name, parameter.requires_grad))
        del model._lora_edge
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model computes the base model's own output: no update, base head, base BatchNorm statistics.

    Raises:
        RuntimeError: the model is not adapted.
    """
    model, state, layers = require_adapted(model)
    switches: list[LoRAEdgeConv | Reparametrisation] = [*layers.values(), *reparametrised_layers(model).values()]
    enabled = [switch.enabled for switch in switches]
    trained: dict[str, Tensor] = {}
    head = model.get_submodule(state.head) if state is not None and state.head is not None else None
    try:
        for switch in switches:
            switch.enabled = False
        if head is not None and state is not None:
            for name, parameter in head.named_parameters():
                trained[name] = parameter.data
                parameter.data = state.base_head[name].to(parameter.device, parameter.dtype)
        with calibration.on_base_statistics(model):
            yield model
    finally:
        for switch, was in zip(switches, enabled, strict=True):
            switch.enabled = was
        for name, data in trained.items():
            head.get_parameter(name).data = data  # type: ignore[union-attr]


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters an optimizer needs: the cores ``(O, r1)``, and the head's with ``train_head=True``.

    Raises:
        RuntimeError: the model is not adapted.
    """
    model, _, _ = require_adapted(model)
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def require_adapted(model: nn.Module) -> tuple[nn.Module, AdaptState | None, dict[str, LoRAEdgeConv]]:
    """The unwrapped model, its state (None where the layers were built, not adapted) and its adapted layers.

    Raises:
        RuntimeError: the model is not adapted.
    """
    model = unwrap(model)
    state, layers = adapt_state(model), adapted_layers(model)
    if state is None and not layers:
        raise RuntimeError("the model is not adapted; call lora_edge.adapt(model) first")
    return model, state, layers


def adapt_state(model: nn.Module) -> AdaptState | None:
    """The state that ``adapt`` left on the model, None where it is not adapted."""
    return model.__dict__.get("_lora_edge")


def adapted_layers(model: nn.Module) -> dict[str, LoRAEdgeConv]:
    """Dotted name and layer of every adapted convolution, each once, in registration order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRAEdgeConv)}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while adapt_state(model) is None:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            break
        model = inner
    return model


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and values of the base model's state, adapted or not.

    The update, a trained head and moved BatchNorm statistics do not count: the base's own values stand in for them.
    """
    state = adapt_state(model)
    base: dict[str, Tensor] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, norm in modules.items():
        for key, value in calibration.base_statistics(norm).items():
            base[_join(name, key)] = value
    if state is not None and state.head is not None:
        base.update({_join(state.head, key): value for key, value in state.base_head.items()})
    added = {_join(n, key) for n, m in modules.items() if isinstance(m, LoRAEdgeConv) for key in ("core", "suffix")}
    own = {name: value for name, value in model.state_dict().items() if name not in added}
    return fingerprint_state({**own, **base})


def fingerprint_state(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values of a plain state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def select(
    model: nn.Module,
    targets: Sequence[str] | str | None,
    exclude: Sequence[str] | str | None,
    bn: str = "batch",
) -> list[str]:
    """Names of the convolutions that ``targets`` and ``exclude`` choose, in registration order.

    With ``bn="frozen"`` a BatchNorm that cannot be frozen is refused unless ``exclude`` names it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt: model is a {type(model).__name__}; give a torch.nn.Module")
    if adapt_state(model) is not None or adapted_layers(model):
        raise RuntimeError("the model is adapted already; merge it first, or adapt a fresh copy of the base model")
    names = [name for name, module in model.named_modules() if type(module) in ADAPTED_CLASS and "weight" in module._parameters]
    if not names:
        raise ValueError("the model has no nn.Conv1d, nn.Conv2d or nn.Conv3d; there is nothing to adapt")
    chosen = names if targets is None else _match("targets", targets, names)
    loose = frozen_bn.unfreezable(model) if bn == "frozen" else {}
    left_out = [] if exclude is None else _match("exclude", exclude, [*names, *loose])
    for name, why in loose.items():
        if name not in left_out:
            raise ValueError(f'{name}: {why}; put {name!r} in exclude to leave it as it is, or use bn="batch"')
    chosen = [name for name in chosen if name not in left_out]
    if not chosen:
        raise ValueError(f"exclude={exclude!r} leaves no convolution to adapt; exclude fewer")
    return chosen


def find_head(model: nn.Module) -> str:
    """Name of the classifier: the last ``nn.Linear``."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError("train_head=True, but the model has no nn.Linear; use train_head=False")
    return linears[-1]


def _match(option: str, patterns: Sequence[str] | str, names: list[str]) -> list[str]:
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    hits: set[str] = set()
    for pattern in wanted:
        found = [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not found:
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ValueError(f"{option}: {pattern!r} matches no convolution; the closest are {', '.join(map(repr, close))}")
        hits.update(found)
    if not wanted:
        raise ValueError(f"{option} is empty; name at least one convolution, or leave it out")
    return [name for name in names if name in hits]


def _left_alone(model: nn.Module, bn: str) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and type(module) not in ADAPTED_CLASS:
            reasons[name] = f"{type(module).__name__} is not exactly nn.Conv1d, nn.Conv2d or nn.Conv3d, left alone"
        elif type(module) in ADAPTED_CLASS and "weight" not in module._parameters:
            reasons[name] = lean.COMPUTED_WEIGHT
        elif isinstance(module, _BatchNorm) and bn == "frozen" and (why := frozen_bn.why_not_frozen(module)):
            reasons[name] = why
    return reasons


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; give one of {', '.join(map(repr, choices))}")


def _saved_dtype(saved_dtype: str | torch.dtype | None) -> torch.dtype | None:
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    if saved_dtype is None or saved_dtype in known.values():
        return saved_dtype  # type: ignore[return-value]
    if saved_dtype not in known:
        raise ValueError(f'saved_dtype is {saved_dtype!r}; give "float16", "bfloat16" or None')
    return known[saved_dtype]  # type: ignore[index]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
