"""Which backend runs an op: ``torch`` (any device of torch), ``cuda`` and ``cpu`` (the compiled extension) or ``triton``.

A call's own ``backend=`` overrides :func:`use_backend`, which overrides the variable LORA_EDGE_BACKEND, which overrides "auto".
For tensors on a CUDA device "auto" chooses cuda where it works, else triton where that works; for whole blocks on the CPU it
chooses cpu; everything else runs on torch. The choice follows an explicit rule, never a caught exception. Under
``torch.compile`` it is made when the call is traced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lora_edge.environment.torch_private import constant_when_traced
from lora_edge.ops.engines import registry as engines

AVAILABLE = "available"
NAMES = ("auto", *engines.ENGINES)
VARIABLE = "LORA_EDGE_BACKEND"
_context: ContextVar[str | None] = ContextVar("lora_edge_backend", default=None)
_NOT_NAMED = ("auto", "")
# Every forward of every layer reads the variable. Most of the time of os.environ goes into encoding its name, so the name is
# encoded once and looked up in the dictionary behind os.environ.
_environment = getattr(os.environ, "_data", os.environ)
_KEY = VARIABLE if _environment is os.environ else os.environ.encodekey(VARIABLE)


def backends() -> dict[str, str]:
    """Each backend's name with ``"available"`` or the reason why it does not work here."""
    return {name: state(name) for name in (engines.TORCH, *engines.WITH_KERNELS)}


def state(backend: str) -> str:
    """``"available"`` or why a backend does not work here; the other backends are neither asked nor imported."""
    return AVAILABLE if backend == "auto" else engines.reason(backend) or AVAILABLE


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Inside, calls that name no backend themselves use this one; safe with threads and asyncio.

    Args:
        backend: "auto", "torch", "cpu", "cuda" or "triton".

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
    """The backend that a call requests, by argument, context or environment: "auto" or one that works here.

    Raises:
        ValueError: the name is unknown; the message says where it came from.
        RuntimeError: the named backend does not work here; the message says why.
    """
    backend, source = requested(backend)
    if backend not in ("auto", "torch"):
        require_backend(backend, op, source)
    return backend


def requested(backend: str) -> tuple[str, str]:
    """The name requested by argument, context or environment, and where it came from, for a message."""
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
