"""``adapt``: give a model's convolutions trained cores, in place; and ``trainable_parameters``, what an optimizer then trains.

Module identity, names, hooks and the order of keys are preserved. :func:`install` carries out an adaptation whose suffixes are
known; ``load_adapter`` uses it too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_edge.nn import blocks, frozen_bn, lean
from lora_edge.nn.bn_statistics import batch_norms, remember_statistics
from lora_edge.nn.layers import ADAPTED_CLASS, LoRAEdgeConv, add_core, check_adaptable, check_suffix
from lora_edge.ops.backends import require_backend
from lora_edge.subspaces.budget import parse_budget
from lora_edge.subspaces.choose import FROM_BATCHES, SUBSPACES, choose_suffixes, naming_layer
from lora_edge.subspaces.samples import MOST_BATCHES
from lora_edge.subspaces.weight import SCALINGS
from lora_edge.surgery import base_state
from lora_edge.surgery.adapted import AdaptState, adapt_state, adapted_layers, refuse_adapted, require_adapted, unwrap
from lora_edge.surgery.head import find_head, named_head
from lora_edge.surgery.idle_cores import watch
from lora_edge.surgery.protect import protect
from lora_edge.surgery.selection import left_alone, select
from lora_edge.surgery.ties import share, tied_groups
from lora_edge.tt import check_rank, contracted

BN_MODES = ("frozen", "batch")


@dataclass
class LayerUpdate:
    """The update of one convolution.

    Attributes:
        frozen: its frozen cores ``[G2, ..., Gd]``, or the contracted suffix ``(r1, I/g, *K)``; ``(r, I/g, 1, ...)`` in the
            form "kernel".
        core: ``(O, r1)``, or ``(O, r, *K)`` in the form "kernel"; None for zeros.
        scale: factor of the update.
        bond_cap: the requested rank; None for ``r1``.
        form: "core", or "kernel" for a trained kernel.
    """

    frozen: Tensor | Sequence[Tensor]
    core: Tensor | None = None
    scale: float = 1.0
    bond_cap: int | None = None
    form: str = "core"


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
    """Adapt a model's convolutions in place: freeze everything and give each convolution a trained core.

    Right afterwards the output is bit-identical to the base model's (where gradients are needed, fused blocks agree with it
    within 1e-6 in relative norm). Train what :func:`trainable_parameters` yields, then call :func:`lora_edge.merge`.

    Convolutions that share a weight share a core. Buffers that move in training (statistics, counters) belong to the adapter:
    it saves them, and :func:`lora_edge.disabled` restores the base's.

    Args:
        model: any module; its ``nn.Conv1d/2d/3d`` are adapted, subclasses of them are left alone. If it is wrapped in
            ``DataParallel`` or ``torch.compile``, the inner model is adapted.
        rank: cap of every TT bond, at least 1; ignored if ``params`` is given.
        targets: dotted names or globs of the convolutions to adapt; None for all.
        exclude: dotted names or globs to leave out. It may also name a BatchNorm subclass that cannot be frozen, which would
            otherwise be refused.
        params: a budget of trained parameters instead of one rank: a share of the model's parameters as "0.5%", the bytes of
            the cores as "20kB", or a number of parameters. It is spread over the layers as ranks from 1 to 16, by the energy
            of the gradient that each further rank captures if ``batches`` are given, otherwise by the weight's squared singular
            values. A layer that gets no rank stays frozen, and ``summary`` says so. A trained head does not count.
        subspace: the directions that the update may use. "weight": the leading right singular directions of the pre-trained
            weight, as in the paper. "input": the principal directions of each layer's input on ``batches``. "gradient": the
            leading right singular directions of the gradient on ``batches``. "auto": the same as "weight"; in the study neither
            of the other two is better over all data sets.
        batches: inputs from the target, ``x`` or tuples that start with it; for "gradient" and ``params``, pairs ``(x, y)``
            with classes, and the loss is the cross-entropy. Equal parts of the first four are used, together as many samples
            as the largest holds. "input" takes as long as one to two training steps at batch 64, "gradient" three to five.
            BatchNorm uses its running statistics whatever ``bn`` says, so call :func:`lora_edge.calibrate_bn` first.
        scaling: "balanced" gives all suffix rows of a layer one common norm, "paper" leaves the singular values in them.
        bn: "frozen" keeps BatchNorm on its running statistics through ``model.train()`` until ``merge``; "batch" leaves it to
            ``train()`` and ``eval()`` as before, which saves its input for backward and prevents block fusing. Its affine
            parameters are frozen either way.
        train_head: also train the classifier: its dotted name, or True to find it: the last ``nn.Linear`` that runs on
            ``batches`` if they are given, otherwise the last one registered. ``summary`` shows which it is.
        lean: run ``conv → BN → (+ residual) → activation`` as one op and the other layers in lean form, so that almost nothing
            is saved for backward; ``summary`` shows what was fused. False leaves all other layers stock.
        saved_dtype: "float16" or "bfloat16" to keep ``h`` in half precision between forward and backward; None for its own.
        backend: "auto", "torch", "cpu", "cuda" or "triton" for this model's convolutions; see
            :mod:`lora_edge.ops.backends`.

    Returns:
        The model.

    Raises:
        TypeError: ``rank`` is not an integer, or ``model`` is not a module.
        ValueError: ``rank`` is below 1, an option is unknown, a name matches nothing, a layer is not supported, an adapted
            convolution shares its weight with something that is not adapted, ``params`` is below the smallest core, or
            ``batches`` is missing, not used or empty, or yields no gradient, NaN or Inf.
        RuntimeError: the model or a part of it is already adapted, it contains a DistributedDataParallel, it cannot be copied
            for the gradient pass, or the named backend does not work here. All errors are raised before anything is changed.
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
        raise ValueError('batches is given, but subspace="weight" uses it only with params; leave it out, or give params')
    if not isinstance(train_head, (bool, str)):
        raise TypeError(f"train_head is {train_head!r}, a {type(train_head).__name__}; give a bool or a module's dotted name")
    outer, model = model, inner_model(model)
    names = select(model, targets, exclude, bn)
    budget = None if params is None else parse_budget(params, model)
    for name in names:
        with naming_layer(name):
            check_adaptable(model.get_submodule(name))  # type: ignore[arg-type]
    groups = tied_groups(model, names)
    if batches is not None:
        batches = _few(batches, model)  # it may be an iterator, and is read more than once
    head: str | None = None
    if isinstance(train_head, str):
        head = named_head(model, train_head, names)
    elif train_head:
        head = find_head(model, batches)
    looked_at = batches if subspace in FROM_BATCHES or params is not None else None
    chosen = choose_suffixes(model, groups, rank, budget, subspace, looked_at, scaling, backend)
    updates = {
        name: LayerUpdate(chosen[group[0]][1], bond_cap=chosen[group[0]][0])
        for group in groups
        for name in group
        if group[0] in chosen
    }
    updates = {name: updates[name] for name in names if name in updates}
    install(
        model, updates, scaling=scaling, bn=bn, head=head, lean_layers=lean, saved_dtype=saved, backend=backend,
        subspace=subspace,
    )  # fmt: skip
    state = adapt_state(model)
    assert state is not None
    state.left_alone.update({name: f"params={params!r} leaves no rank for it, frozen" for name in names if name not in updates})
    return outer


def install(
    model: nn.Module,
    updates: dict[str, LayerUpdate],
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
    """Carry out :func:`adapt` for layers whose suffixes are known.

    Args:
        model: the base model.
        updates: of each convolution to adapt, by dotted name.
        scaling, bn, lean_layers, backend, subspace: as for :func:`adapt`.
        head: name of the module to train whole, if any.
        saved_dtype: of ``h`` between forward and backward.
        replaced: names in the base's state that its fingerprint leaves out, because other tensors replaced them.
        keep: further names whose base values are kept, because they are about to change.
    """
    refuse_adapted(model)
    for name, update in updates.items():
        check_suffix(model.get_submodule(name).weight, update.frozen, update.form)  # type: ignore[arg-type]
    groups = tied_groups(model, updates)
    for group in groups:
        _check_one_update(group, updates)
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
    for name, update in updates.items():
        conv: LoRAEdgeConv = model.get_submodule(name)  # type: ignore[assignment]
        conv.__class__ = ADAPTED_CLASS[type(conv)]  # type: ignore[assignment]
        add_core(
            conv, update.frozen, update.core, update.scale, update.bond_cap, scaling, saved_dtype, backend, subspace,
            update.form,
        )  # fmt: skip
        conv.belongs_to_adapted = True
    for group in groups:
        share([model.get_submodule(name) for name in group])  # type: ignore[misc]
    for name, norm in batch_norms(model):
        if bn == "frozen" and frozen_bn.why_not_frozen(norm) is None:
            frozen_bn.freeze_bn(norm, lean_layers)
            state.frozen_norms.append(name)
        else:
            remember_statistics(norm)
    if head is not None:
        model.get_submodule(head).requires_grad_(True)
    if lean_layers:
        state.left_alone.update(lean.make_lean(model, backend))
        fused = blocks.fuse(model)
        state.blocks, state.not_fused = fused.blocks, fused.reasons
    protect(model)
    state.load_hook = model.register_load_state_dict_post_hook(_after_load_state_dict)
    model._lora_edge = state  # type: ignore[assignment]
    watch(model, state, adapted_layers(model))
    return model


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that an optimizer needs: the cores ``(O, r1)``, and the head's with ``train_head``.

    For a module that holds adapted models, these are all of its parameters that require a gradient.

    Raises:
        RuntimeError: nothing in the model is adapted, or a tool replaced a frozen BatchNorm since ``adapt``.
    """
    for one in require_adapted(model):
        if one.state is not None:
            base_state.check_norms_are_frozen(one.model, one.state, one.name)
    return (parameter for parameter in unwrap(model).parameters() if parameter.requires_grad)


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model to adapt, without the wrappers that only forward calls to it."""
    inner = model
    while isinstance(inner, nn.Module) and (deeper := unwrap(inner)) is not inner:
        inner = deeper
    for wrapper in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(wrapper, nn.parallel.DistributedDataParallel):
            raise RuntimeError(
                "adapt: DistributedDataParallel was built without the cores, so it would not average them; adapt first"
            )
    return inner


def _check_one_update(group: list[str], updates: dict[str, LayerUpdate]) -> None:
    """Raise ValueError if convolutions that share a weight would get different updates."""
    first = updates[group[0]]
    for name in group[1:]:
        other = updates[name]
        pairs = [(contracted(first.frozen), contracted(other.frozen)), (first.core, other.core)]
        same = all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
        if not same or first.scale != other.scale:
            raise ValueError(f"{group[0]} and {name} share one weight but have different updates; give both the same one")


def _few(batches: Iterable[Any], model: nn.Module) -> list[Any]:
    """Return the first few batches; drawing them leaves torch's generator unchanged."""
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return list(itertools.islice(iter(batches), MOST_BATCHES))
    except TypeError as error:
        raise TypeError(f"batches is a {type(batches).__name__} ({error}); give an iterable of batches") from None


def _after_load_state_dict(model: nn.Module, _: Any) -> None:
    """Take the loaded values as the base's, if another base was loaded into an adapted model."""
    state = adapt_state(model)
    if state is not None:
        base_state.renew_base(model, state)


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
