"""Save and load what any method trained. LoRA-Edge's own adapter format is :func:`lora_edge.save_adapter`."""

from __future__ import annotations

from torch import Tensor, nn

from lora_edge.files.safetensors_file import PathLike, read_safetensors, write_safetensors
from lora_edge.finite import check_finite, check_variances
from lora_edge.methods.base import trained_state
from lora_edge.surgery.base_state import fingerprint_state

FORMAT = "lora_edge trained 1"


def save_trained(model: nn.Module, path: PathLike) -> None:
    """Write :func:`trained_state` to a safetensors file, atomically, with a checksum and the base's fingerprint.

    Raises:
        OSError: the file cannot be written; no partial file remains.
        ValueError: a trained value is NaN or infinite, or a BatchNorm's variance is negative; nothing is written.
    """
    trained = {name: value.cpu().contiguous() for name, value in trained_state(model).items()}
    _check(trained, str(path), "train again with a smaller learning rate, or check the windows")
    metadata = {"format": FORMAT, "base": _base(model, trained), "checksum": fingerprint_state(trained)}
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
    own = trained_state(model)
    for name in sorted({*trained, *own}):
        there, here = (tuple(t[name].shape) if name in t else "missing" for t in (trained, own))
        if there != here:
            raise ValueError(
                f"{path}: {name} is {there} in the file and {here} in the model; prepare by the same method and rank"
            )
    if metadata.get("base") != _base(model, trained):
        raise ValueError(f"{path}: belongs to another base model; prepare the one it was trained from")
    _check(trained, str(path), "train it again")
    model.load_state_dict(trained, strict=False)
    return model


def _check(trained: dict[str, Tensor], what: str, remedy: str) -> None:
    check_finite(trained, what, remedy)
    check_variances(trained, what, remedy)


def _base(model: nn.Module, trained: dict[str, Tensor]) -> str:
    return fingerprint_state({name: value for name, value in model.state_dict().items() if name not in trained})
