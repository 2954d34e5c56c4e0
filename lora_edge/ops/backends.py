"""Which backend runs an op: ``torch`` (any device torch has), ``cuda`` and ``cpu`` (the compiled extension) and ``triton``.

A call's own ``backend=`` wins over :func:`use_backend`, that over the variable LORA_EDGE_BACKEND, that over "auto". "auto"
takes for tensors on a CUDA device the extension where it works, else Triton's kernels where they work; for whole blocks on the
CPU the extension's own engine; else torch. That is by an explicit rule and never by a caught exception. Under
``torch.compile`` the choice is made when the call is traced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lora_edge.environment.torch_private import constant_when_traced
from lora_edge.ops.engines import registry as engines

AVAILABLE = "available"
NAMES = ("auto", "cuda", "triton", "cpu", "torch")
VARIABLE = "LORA_EDGE_BACKEND"
_context: ContextVar[str | None] = ContextVar("lora_edge_backend", default=None)
_NOT_NAMED = ("auto", "")
# Every forward of every layer asks for the variable. os.environ takes longer to encode its name than all else here does, so
# it is looked up in the dictionary behind os.environ, encoded once.
_environment = getattr(os.environ, "_data", os.environ)
_KEY = VARIABLE if _environment is os.environ else os.environ.encodekey(VARIABLE)


def backends() -> dict[str, str]:
    """Each backend's name with ``"available"`` or the reason why it does not work here."""
    return {name: state(name) for name in ("torch", *engines.ENGINES)}


def state(backend: str) -> str:
    """``"available"`` or why a backend does not work here; the others are not asked, nor imported."""
    return AVAILABLE if backend in ("auto", "torch") else engines.reason(backend) or AVAILABLE


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Inside, calls that do not name a backend themselves use this one; safe with threads and asyncio.

    Args:
        backend: "auto", "cuda", "triton", "cpu" or "torch".

    Raises:
        ValueError: ``backend`` is not a known name.
        RuntimeError: the named backend does not work here; the message says why.
    """
    require_backend(backend, "use_backend")
    token = _context.set(backend)
    try:
        yield
    finally:
        _context.reset(token)


@constant_when_traced
def choose_backend(backend: str, op: str) -> str:
    """The backend a call asks for, by argument, context and environment: "auto" or one that works here.

    Raises:
        ValueError: a name is not known; the message says where it came from.
        RuntimeError: the named backend does not work here; the message says why.
    """
    backend, source = requested(backend)
    if backend not in ("auto", "torch"):
        require_backend(backend, op, source)
    return backend


def requested(backend: str) -> tuple[str, str]:
    """The name asked for by argument, context and environment, and for a message where it came from."""
    if backend == "auto":
        backend = _context.get() or "auto"
        if backend == "auto":
            if _environment.get(_KEY) and (wanted := os.environ.get(VARIABLE)):
                return wanted, f" (from {VARIABLE})"
            return _NOT_NAMED
    return backend, ""


def require_backend(backend: str, op: str, source: str = "") -> None:
    """Refuse a name that is unknown (ValueError) or does not work here (RuntimeError); never fall back silently."""
    if backend not in NAMES:
        raise ValueError(f"{op}: backend is {backend!r}{source}; give one of {', '.join(map(repr, NAMES))}")
    reason = state(backend)
    if reason != AVAILABLE:
        raise RuntimeError(f'{op}: backend {backend!r}{source} is {reason}; or use "torch" or "auto"')
