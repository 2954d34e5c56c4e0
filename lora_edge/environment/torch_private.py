"""The one place where the library uses names of torch that are private or newer than torch 2.4, each with a fallback.

JetPack 6 has builds of torch 2.4 to 2.7, a desktop has the newest; the library runs on both. Each function says which version
introduced the name and what replaces it elsewhere. A test (test_torch_names.py) lists the private names that are used outside
this module, all of them older than 2.4, and fails on any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad as _forward_ad
from torch.nn.modules import module as _module

_Function = TypeVar("_Function", bound=Callable[..., Any])

_has_any_global_hook: Callable[[], Any] | None = getattr(_module, "_has_any_global_hook", None)  # since torch 2.8
# What that function reads. All are older than 2.4 except the last, which is new in 2.6.
_GLOBAL_HOOKS = (
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
)

_cudnn_conv: Any = getattr(torch.backends.cudnn, "conv", None)  # since torch 2.9
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def has_any_global_hook() -> bool:
    """Whether a hook is registered that runs at every module's call.

    ``torch.nn.modules.module._has_any_global_hook`` is new in torch 2.8; before that, the dictionaries that it reads are used.
    """
    if _has_any_global_hook is not None:
        return bool(_has_any_global_hook())
    return any(getattr(_module, name, None) for name in _GLOBAL_HOOKS)


def convolutions_run_in_tf32() -> bool:
    """Whether torch's setting lets float32 convolutions on a CUDA device run in TF32; it may change at any time.

    ``torch.backends.cudnn.conv.fp32_precision`` is new in torch 2.9; before that, ``torch.backends.cudnn.allow_tf32`` is read,
    which newer versions refuse to read if the two disagree.
    """
    return bool(torch.backends.cudnn.allow_tf32) if _cudnn_conv is None else _cudnn_conv.fp32_precision == "tf32"


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is active in this thread.

    ``torch._C._are_functorch_transforms_active``, which ``torch.autograd.Function.apply`` uses itself, and
    ``torch.autograd.forward_ad._current_level`` exist since 2.0 or earlier. Without them no transform is detected.
    """
    return _transforms_active() or getattr(_forward_ad, "_current_level", -1) >= 0


def constant_when_traced(function: _Function) -> _Function:
    """Mark a function as constant: it runs when a call of it is traced.

    Does what ``torch.compiler.assume_constant_result`` does, without importing all of torch._dynamo. The attribute is older
    than 2.4. A torch that ignored it would trace into the function and break the graph there.

    Torch stores the result as a global variable beside the code that it compiles, under the name in the function's code; torch
    2.4 overwrites whatever has that name there, such as the function itself. So the name is made unique.
    """
    code: Any = function.__code__  # type: ignore[attr-defined]
    name = f"_{function.__module__}_{code.co_name}".replace(".", "_")
    function.__code__ = code.replace(co_name=name)  # type: ignore[attr-defined]
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def current_stream_reader() -> Callable[[int], int]:
    """Return a function from a CUDA device's index to the address of its current stream.

    ``torch._C._cuda_getCurrentRawStream`` is older than 2.4, but only builds with CUDA have it; otherwise the public, slower
    ``torch.cuda.current_stream`` is used.
    """
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw or (lambda index: torch.cuda.current_stream(index).cuda_stream)


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """Return the names of a module's buffers that its state dict leaves out.

    ``Module._non_persistent_buffers_set`` is older than 2.4; without it they are found by comparing with the state dict.
    """
    found = getattr(module, "_non_persistent_buffers_set", None)
    if found is not None:
        return found
    own = module.state_dict()
    return {name for name in module._buffers if name not in own}
