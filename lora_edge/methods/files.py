"""Save and load what any method trained. LoRA-Edge's own adapter format is :func:`lora_edge.save_adapter`."""

from __future__ import annotations

from collections.abc import Set

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lora_edge.files.safetensors_file import PathLike, read_safetensors, write_safetensors
from lora_edge.finite import check_finite, check_variances
from lora_edge.nn import bn_statistics, frozen_bn
from lora_edge.nn.layers import LoRAEdgeConv
from lora_edge.nn.reparametrised import added_tensors
from lora_edge.surgery.adapted import unwrap
from lora_edge.surgery.base_state import fingerprint_state, join, other_buffers

FORMAT = "lora_edge trained 1"


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the tensors that a method added to the base model or trains in it, by their names in ``state_dict``.

    They are the trainable parameters, all factors and suffixes, frozen ones too, and the statistics of each BatchNorm that
    is not frozen or was calibrated, and other buffers, which a forward may move: counters, a spectral norm's vectors. A shared
    tensor appears once, under the first of its names. Names are those of the model in a wrapper, such as ``DataParallel``.
    """
    model = unwrap(model)
    found: dict[int, str] = {}
    for name, value in _own_tensors(model).items():
        found.setdefault(id(value), name)
    state = model.state_dict()
    return {name: state[name].detach().clone() for name in found.values()}


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves, under each of their names."""
    own = set(other_buffers(model))
    own.update(name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
    own.update(name for name, _ in added_tensors(model))
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRAEdgeConv):
            own.add(join(prefix, "suffix"))
        is_frozen = isinstance(module, frozen_bn.FrozenNorm) and not bn_statistics.base_statistics(module)
        if isinstance(module, _BatchNorm) and not is_frozen:
            own.update(join(prefix, name) for name in bn_statistics.STATISTICS)
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if name in own}


def save_trained(model: nn.Module, path: PathLike) -> None:
    """Write :func:`trained_state` to a safetensors file, atomically, with a checksum and the base's fingerprint.

    Raises:
        OSError: the file cannot be written; no partial file remains.
        ValueError: a trained value is NaN or infinite, or a BatchNorm's variance is negative; nothing is written.
    """
    trained = {name: value.cpu().contiguous() for name, value in trained_state(model).items()}
    _check(model, trained, str(path), "train again with a smaller learning rate, or check the windows")
    metadata = {
        "format": FORMAT,
        "base": _base(unwrap(model), _own_tensors(unwrap(model)).keys()),
        "checksum": fingerprint_state(trained),
    }
    write_safetensors(trained, path, metadata)


def load_trained(model: nn.Module, path: PathLike) -> nn.Module:
    """Load a file of :func:`save_trained`, in place, into the same base model prepared by the same method and rank.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, is damaged, or belongs to another method, rank or base; or it holds NaN,
            infinity or a negative variance. The model is unchanged.
    """
    trained, metadata = read_safetensors(path, "save_trained")
    if metadata.get("format") != FORMAT or metadata.get("checksum") != fingerprint_state(trained):
        raise ValueError(f"{path}: damaged, or not written by save_trained; save it again")
    outer, model = model, unwrap(model)
    older = other_buffers(model).keys() - trained.keys()  # in a file from before 30 November 2026, to which they are the base's
    own = {name: value for name, value in trained_state(model).items() if name not in older}
    names = _own_tensors(model).keys() - older
    trained = {
        name: value for name, value in trained.items() if name in own or name not in names
    }  # once, as older files do not
    for name in sorted({*trained, *own}):
        there, here = (tuple(t[name].shape) if name in t else "missing" for t in (trained, own))
        if there != here:
            raise ValueError(
                f"{path}: {name} is {there} in the file and {here} in the model; prepare by the same method and rank"
            )
    if metadata.get("base") != _base(model, names | trained.keys()):
        raise ValueError(f"{path}: belongs to another base model; prepare the one it was trained from")
    _check(model, trained, str(path), "train it again")
    model.load_state_dict(trained, strict=False)
    return outer


def _check(model: nn.Module, trained: dict[str, Tensor], what: str, remedy: str) -> None:
    buffers = {name: trained[name] for name in other_buffers(unwrap(model)) if name in trained}
    check_finite({name: value for name, value in trained.items() if name not in buffers}, what, remedy)
    check_finite(buffers, what, remedy, allow_infinity=True)  # an attention mask may hold them
    check_variances(trained, what, remedy)


def _base(model: nn.Module, without: Set[str]) -> str:
    return fingerprint_state({name: value for name, value in model.state_dict().items() if name not in without})
