"""Which backend runs an op: ``torch`` (this CPU or any device torch has), ``cuda`` and ``triton``."""

from __future__ import annotations

AVAILABLE = "available"
_REASONS = {
    "torch": AVAILABLE,
    "cuda": "not part of this version: the compiled extension is not written yet",
    "triton": "not part of this version: the Triton kernels are not written yet",
}


def backends() -> dict[str, str]:
    """Each backend's name with ``"available"`` or the reason why it does not work here."""
    return dict(_REASONS)


def choose_backend(backend: str, op: str) -> str:
    """Resolve ``"auto"`` and refuse what is unknown or does not work here; never fall back silently.

    Raises:
        ValueError: ``backend`` is not a known name.
        RuntimeError: the named backend does not work here; the message says why.
    """
    if backend == "auto":
        return "torch"
    if backend not in _REASONS:
        raise ValueError(f'{op}: backend is {backend!r}; give one of "auto", {", ".join(map(repr, _REASONS))}')
    if _REASONS[backend] != AVAILABLE:
        raise RuntimeError(f'{op}: backend {backend!r} is {_REASONS[backend]}; use "torch" or "auto"')
    return backend
