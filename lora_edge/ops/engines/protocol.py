"""What an engine is: a package ``lora_edge/ops/engines/<name>/`` with the modules ``available`` and ``launch``.

``available`` (:class:`Available`) says whether the engine works on this machine and with which tensors. It is imported with the
library, so it imports nothing that is large or may be missing. ``launch`` (:class:`Engine`) runs the ops; it is imported when
the engine is first used. Its name goes into :mod:`lora_edge.ops.engines.registry`.

Checks of arguments, the choice of an engine, call plans, autograd and torch's custom operators are shared: an engine with
kernels gets addresses, not decisions. The engine ``torch`` has no kernels to plan; it has ``block``, ``fuse`` and ``dora``
instead (:mod:`lora_edge.ops.engines.torch.launch`), supports every call and is what dispatch falls back to under "auto".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lora_edge.ops.block_tensors import BackwardTensors, BlockTensors

if TYPE_CHECKING:
    from lora_edge.ops.plan import BlockPlan, DoraPlan, FusePlan

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of x, core, bias and residual


class Available(Protocol):
    """The module ``available``. ``leaves`` is optional."""

    def runtime(self) -> Any:
        """What the engine needs of the machine, a NamedTuple ``Runtime``; or the reason why it does not work here, a str."""

    def reason(self, device: torch.device | None = None) -> str | None:
        """Why the engine does not run here (on this device), None where it does."""

    def device_type(self) -> str:
        """Type of the devices whose tensors the engine supports, where it works."""

    def leaves(self, op: str, by_name: bool, traced: bool) -> str | None:
        """Why the engine leaves an op to torch whatever its sizes, None where it does not. Optional: it leaves nothing.

        ``by_name`` says that the call asks for this engine, ``traced`` that torch.compile traces the call.
        """


class Engine(Protocol):
    """The module ``launch`` of an engine with kernels.

    Outputs and scratch come from torch's allocator; nothing waits for the device, so a CUDA graph captures a call.

    Attributes:
        DTYPES: dtypes of ``x`` that are supported, float32 first. This and the next two tell ``lora-edge check`` what to run.
        GROUPS: whether adapted convolutions with groups are supported.
        TF32: whether float32 products run in TF32 where torch's setting allows it.
        CHANNELS_LAST: whether maps are written channels-last whatever the layout of ``x``.

    Optional: ``lay_out(x)``, ``x`` in the layout that the engine keeps from block to block; ``in_layout_of(y, x, weight)``,
    ``y`` in the layout that a caller of an op expects, where the kernels do not write it so; and the functions of
    :class:`FusingEngine` and :class:`DoraEngine`.
    """

    DTYPES: tuple[torch.dtype, ...]
    GROUPS: bool
    TF32: bool
    CHANNELS_LAST: bool

    def __hash__(self) -> int:
        """Plans are cached by the engine; a module has a hash."""

    def plan_type(self) -> Any:
        """A class of plans, ``Plan(**fields)`` of csrc/problem.h, with ``refusal(op)`` and ``scratch()``, on this machine."""

    def block_forward(self, plan: BlockPlan, tensors: BlockTensors) -> tuple[Tensor, Tensor | None]:
        """``y``, and what backward needs as one buffer of bytes, None where it needs nothing."""

    def block_backward(self, plan: BlockPlan, tensors: BackwardTensors, needs: Sequence[bool]) -> Gradients:
        """Gradients of x, core, bias and residual, each None where ``needs`` says so. ``dy`` may have any strides."""


class FusingEngine(Engine, Protocol):
    """An engine that has ``tt_fuse``. One without has neither function and says why in ``leaves``."""

    def fuse_forward(self, plan: FusePlan, weight: Tensor, core: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """``W + scale * B S``, dense."""

    def fuse_backward(self, plan: FusePlan, dout: Tensor, core: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """``scale * dW' S^T``, the gradient of the core."""


class DoraEngine(Engine, Protocol):
    """An engine that has ``dora_fuse``. One without has neither function and says why in ``leaves``."""

    def dora_forward(
        self, plan: DoraPlan, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weight, dense, and the norms ``(O,)`` of the rows ``W + scale * B A`` in float32."""

    def dora_backward(
        self, plan: DoraPlan, dout: Tensor, weight: Tensor, core: Tensor, suffix: Tensor, magnitude: Tensor, norms: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Gradients of core, suffix and magnitude, each None where ``needs`` says so; the norms are a constant."""
