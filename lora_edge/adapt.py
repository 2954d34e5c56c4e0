"""Model surgery: adapt, merge, disabled, trainable_parameters. In place; module identity, names and hooks survive."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_edge import calibration
from lora_edge.finite import check_finite, check_variances
from lora_edge.nn import blocks, frozen_bn, lean
from lora_edge.nn.layers import (
    ADAPTED_CLASS,
    LoRAEdgeConv,
    attach,
    check_adaptable,
    check_suffix,
    detach,
    require_whole,
    set_weights,
)
from lora_edge.nn.reparametrised import Reparametrisation, bake, reparametrised_layers
from lora_edge.ops import tt_fuse
from lora_edge.ops.backends import require_backend
from lora_edge.subspaces.budget import parse_budget
from lora_edge.subspaces.samples import MOST_BATCHES
from lora_edge.subspaces.weight import FROM_BATCHES, SCALINGS, SUBSPACES
from lora_edge.surgery import base_state
from lora_edge.surgery.base_state import fingerprint, fingerprint_state, renew_base
from lora_edge.surgery.choice import choose, named
from lora_edge.surgery.find import (
    Adapted,
    AdaptState,
    adapt_state,
    adapted_layers,
    refuse_adapted,
    require_adapted,
    unwrap,
)
from lora_edge.surgery.guarded import guard, unguard
from lora_edge.surgery.idle import end_watch, warn_of_idle_cores, watch
from lora_edge.surgery.selection import find_head, left_alone, named_head, select
from lora_edge.surgery.ties import share, tied_groups
from lora_edge.tt import check_rank, contracted

__all__ = [
    "AdaptState",
    "LayerPlan",
    "adapt",
    "adapt_state",
    "adapted_layers",
    "disabled",
    "find_head",
    "fingerprint",
    "fingerprint_state",
    "install",
    "merge",
    "require_adapted",
    "select",
    "trainable_parameters",
    "unwrap",
]

BN_MODES = ("frozen", "batch")


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
    train_head: bool | str = False,
    lean: bool = True,
    saved_dtype: str | torch.dtype | None = None,
    backend: str = "auto",
) -> nn.Module:
    """Adapt a model's convolutions in place: freeze everything, give each convolution a trained core.

    Right afterwards the output is bit-identical to the base model's (where gradients are needed, fused blocks agree with it
    within 1e-6 in relative norm). Train what :func:`trainable_parameters` yields, then
    call :func:`merge`.

    Convolutions that share one weight share one core. Buffers that move in training (statistics, counters) belong to the
    adapter: it saves them, and :func:`disabled` goes back to the base's.

    Args:
        model: any module; its ``nn.Conv1d/2d/3d`` are adapted, subclasses of them are left alone. Inside ``DataParallel`` or
            ``torch.compile`` it is the inner model that is adapted.
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
        train_head: also train the classifier: its dotted name, or True to have it found: the last ``nn.Linear`` that runs on
            ``batches`` where they are given, else the last one registered. ``summary`` says which it is.
        lean: run ``conv → BN → (+ residual) → activation`` as one op and the other layers in lean form, so that next to
            nothing is saved for backward; ``summary`` shows what was fused. False leaves all other layers stock.
        saved_dtype: "float16" or "bfloat16" keeps ``h`` in half precision between forward and backward; None in its own.
        backend: "auto", "torch", "cuda" or "triton" for the convolutions of this model; see :mod:`lora_edge.ops.backends`.

    Returns:
        The model.

    Raises:
        TypeError: ``rank`` is no integer, or ``model`` no module.
        ValueError: ``rank`` is below 1, an option is unknown, a name matches nothing, a layer is not supported, an adapted
            convolution shares its weight with something that is not adapted, ``params`` is below the smallest core, or
            ``batches`` is missing, not used or empty, or yields no gradient, NaN or Inf.
        RuntimeError: the model or a part of it is adapted already, is in DistributedDataParallel, cannot be copied for the
            gradient, or the named backend does not work here. All of these are raised before anything is changed.
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
    elif subspace == "weight" and batches is not None and params is None and train_head is not True:
        raise ValueError('batches is given, but subspace="weight" uses it with params only; leave it out, or give one of them')
    if not isinstance(train_head, (bool, str)):
        raise TypeError(f"train_head is {train_head!r}, a {type(train_head).__name__}; give a bool or a module's dotted name")
    outer, model = model, _inner(model)
    names = select(model, targets, exclude, bn)
    budget = None if params is None else parse_budget(params, model)
    for name in names:
        with named(name):
            check_adaptable(model.get_submodule(name))  # type: ignore[arg-type]
    groups = tied_groups(model, names)
    if batches is not None:
        batches = _few(batches, model)  # it may be an iterator, and is gone through more than once
    head: str | None = None
    if isinstance(train_head, str):
        head = named_head(model, train_head, names)
    elif train_head:
        head = find_head(model, batches)
    looked_at = batches if subspace in FROM_BATCHES or params is not None else None
    chosen = choose(model, groups, rank, budget, subspace, looked_at, scaling, backend)
    plans = {
        name: LayerPlan(chosen[group[0]][1], bond_cap=chosen[group[0]][0])
        for group in groups
        for name in group
        if group[0] in chosen
    }
    plans = {name: plans[name] for name in names if name in plans}
    install(
        model, plans, scaling=scaling, bn=bn, head=head, lean_layers=lean, saved_dtype=saved, backend=backend,
        subspace=subspace,
    )  # fmt: skip
    state = adapt_state(model)
    assert state is not None
    state.left_alone.update({name: f"params={params!r} holds no rank for it, frozen" for name in names if name not in plans})
    return outer


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
    replaced: Sequence[str] = (),
    keep: Iterable[str] = (),
) -> nn.Module:
    """Carry out :func:`adapt` for layers whose suffixes are known; ``load_adapter`` uses it as well.

    Args:
        replaced: names of the base's state that its fingerprint does not count, because other tensors took their place.
        keep: names whose base values are kept beside those that always are, because they are about to change.
    """
    refuse_adapted(model)
    for name, plan in plans.items():
        check_suffix(model.get_submodule(name).weight, plan.frozen)  # type: ignore[arg-type]
    groups = tied_groups(model, plans)
    for group in groups:
        _check_one_update(group, plans)
    state = AdaptState(
        bn=bn,
        scaling=scaling,
        fingerprint="",
        requires_grad={name: p.requires_grad for name, p in model.named_parameters()},
        left_alone=left_alone(model, bn),
        head=head,
        subspace=subspace,
        replaced=sorted(replaced),
    )
    base_state.remember(model, state, {*keep, *base_state.parameter_names(model, head)})
    model.requires_grad_(False)
    for name, plan in plans.items():
        conv: LoRAEdgeConv = model.get_submodule(name)  # type: ignore[assignment]
        conv.__class__ = ADAPTED_CLASS[type(conv)]  # type: ignore[assignment]
        attach(conv, plan.frozen, plan.core, plan.scale, plan.bond_cap, scaling, saved_dtype, backend, subspace)
        conv.belongs_to_adapted = True
    for group in groups:
        share([model.get_submodule(name) for name in group])  # type: ignore[misc]
    for name, norm in calibration.batch_norms(model):
        if bn == "frozen" and frozen_bn.why_not_frozen(norm) is None:
            frozen_bn.freeze_bn(norm, lean_layers)
            state.frozen_norms.append(name)
        else:
            calibration.remember_statistics(norm)
    if head is not None:
        model.get_submodule(head).requires_grad_(True)
    if lean_layers:
        state.left_alone.update(lean.make_lean(model, backend))
        fused = blocks.fuse(model)
        state.blocks, state.not_fused = fused.blocks, fused.reasons
    guard(model)
    state.load_hook = model.register_load_state_dict_post_hook(_after_load_state_dict)
    model._lora_edge = state  # type: ignore[assignment]
    watch(model, state, adapted_layers(model))
    return model


def merge(model: nn.Module) -> nn.Module:
    """Fuse every update into its dense kernel, in place; plain ``nn.Conv*`` again, at the base model's cost.

    It takes models of :func:`adapt`, those that hold some (a LightningModule, ``AveragedModel``, any outer module: all inside
    are merged), and those whose convolutions a method of :mod:`lora_edge.methods` reparametrised. The update is fused in
    float32 with one final cast. Module types, names, order of keys, training flags and ``requires_grad`` are those of the
    original model; a trained head, calibrated statistics and other buffers stay as they are now. Convolutions that share a
    weight go on sharing it.

    Returns:
        The model.

    Raises:
        RuntimeError: nothing in the model is adapted, it is a part of an adapted model, or a layer's weight is computed from
            other tensors since ``adapt``.
        ValueError: a merged weight, a trained tensor or a statistic would be NaN, infinite or a negative variance; the
            message names it. The model is left as it was.
    """
    found = require_adapted(model)
    for one in found:
        _check_whole(one, "merge")
        require_whole({base_state.join(one.name, name): layer for name, layer in one.layers.items()})
    fused: list[dict[LoRAEdgeConv, Tensor]] = []
    for one in found:
        with torch.no_grad():
            updated = {
                layer: tt_fuse(layer.weight, layer.core, layer.suffix, layer.scale, backend="torch")
                for layer in one.layers.values()
            }
        names = {layer: name for name, layer in one.layers.items()}
        written = {base_state.join(one.name, f"{names[layer]}.weight"): weight for layer, weight in updated.items()}
        check_finite({**written, **_computed(one), **_trained(one)}, "merge", "train at a lower rate, or load finite values")
        check_variances(one.model, "merge")
        fused.append(updated)
    for one, updated in zip(found, fused, strict=True):
        warn_of_idle_cores(one)
        _merge(one, updated)
    return model


def _merge(one: Adapted, updated: dict[LoRAEdgeConv, Tensor]) -> None:
    model, state = one.model, one.state
    unguard(model)
    end_watch(model)
    bake(model)
    with torch.no_grad():
        set_weights(updated)  # type: ignore[arg-type]
    for layer in updated:
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
        if state.load_hook is not None:
            state.load_hook.remove()
        del model._lora_edge


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model computes the base model's own output: no update, base head, base values of the buffers that moved.

    Every adapted model inside ``model`` counts.

    Raises:
        RuntimeError: nothing in the model is adapted, it is a part of an adapted model, or something was put in or trained
            since ``adapt`` whose base value is not kept; the message names it.
    """
    found = require_adapted(model)
    for one in found:
        _check_whole(one, "disabled")
    with ExitStack() as stack:
        for one in found:
            if one.state is not None:
                stack.enter_context(base_state.on_base_values(one.model, one.state))
            stack.enter_context(calibration.on_base_statistics(one.model))
            stack.enter_context(_without_updates(one))
        yield model


@contextmanager
def _without_updates(one: Adapted) -> Iterator[None]:
    switches: list[LoRAEdgeConv | Reparametrisation] = [*one.layers.values(), *reparametrised_layers(one.model).values()]
    enabled = [switch.enabled for switch in switches]
    try:
        for switch in switches:
            switch.enabled = False
        yield
    finally:
        for switch, was in zip(switches, enabled, strict=True):
            switch.enabled = was


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters an optimizer needs: the cores ``(O, r1)``, and the head's with ``train_head``.

    Of a module that holds adapted models, every parameter of it that requires a gradient.

    Raises:
        RuntimeError: nothing in the model is adapted, or a tool replaced a frozen BatchNorm since ``adapt``.
    """
    for one in require_adapted(model):
        if one.state is not None:
            base_state.check_norms_are_frozen(one.model, one.state, one.name)
    return (parameter for parameter in unwrap(model).parameters() if parameter.requires_grad)


def _inner(model: nn.Module) -> nn.Module:
    """The model that ``adapt`` changes, inside wrappers that only pass calls on."""
    inner = model
    while isinstance(inner, nn.Module) and (deeper := unwrap(inner)) is not inner:
        inner = deeper
    for wrapper in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(wrapper, nn.parallel.DistributedDataParallel):
            raise RuntimeError(
                "adapt: DistributedDataParallel was built without the cores, so it would not average them; adapt first"
            )
    return inner


def _check_whole(one: Adapted, what: str) -> None:
    """Raise RuntimeError for layers of a model that was adapted as a whole, of which this is a part."""
    if one.state is None:
        for name, layer in one.layers.items():
            if layer.belongs_to_adapted:
                raise RuntimeError(f"{what}: {name or 'the layer'} belongs to a larger model that was adapted; give that model")


def _check_one_update(group: list[str], plans: dict[str, LayerPlan]) -> None:
    """Raise ValueError where convolutions with one weight would get two updates."""
    first = plans[group[0]]
    for name in group[1:]:
        other = plans[name]
        pairs = [(contracted(first.frozen), contracted(other.frozen)), (first.core, other.core)]
        same = all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
        if not same or first.scale != other.scale:
            raise ValueError(f"{group[0]} and {name} share one weight, but have an update each; give both the same one")


def _trained(one: Adapted) -> dict[str, Tensor]:
    """What was trained beside the cores, by name."""
    added = {id(t) for layer in one.layers.values() for t in (layer.core, layer.suffix)}
    own = {name: p for name, p in one.model.named_parameters() if p.requires_grad and id(p) not in added}
    buffers = dict(one.model.named_buffers())
    kept = () if one.state is None else one.state.base_values
    return {base_state.join(one.name, name): t for name, t in {**own, **{n: buffers[n] for n in kept if n in buffers}}.items()}


def _computed(one: Adapted) -> dict[str, Tensor]:
    """The weights that a method's reparametrisation computes, by name."""
    convs = reparametrised_layers(one.model)
    return {f"{name}.weight": m.weight.detach() for name, m in one.model.named_modules() if m in convs}  # type: ignore[operator, union-attr]


def _few(batches: Iterable[Any], model: nn.Module) -> list[Any]:
    """The first few batches; what is drawn for them leaves torch's generator as it was."""
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return list(itertools.islice(iter(batches), MOST_BATCHES))
    except TypeError as error:
        raise TypeError(f"batches is a {type(batches).__name__} ({error}); give an iterable of batches") from None


def _after_load_state_dict(model: nn.Module, _: Any) -> None:
    """Another base was loaded into an adapted model: its values are the base's from now on."""
    state = adapt_state(model)
    if state is not None:
        renew_base(model, state)


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
