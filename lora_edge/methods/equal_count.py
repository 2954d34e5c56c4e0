"""The rank at which a method trains about as many elements as another: what ``rank`` counts differs between methods."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from lora_edge.methods.base import Method, NotApplicableError

LADDER = tuple(2**k for k in range(9))  # ranks that are tried first


def nearest_rank(method: Method, model: nn.Module, count: int, inputs: Tensor, labels: Tensor) -> int | None:
    """Return the rank at which the method's trained count is nearest to ``count``; the smallest one of equals.

    The method is prepared on copies of the model, at the powers of two up to 256 and then between the two best neighbours.
    Ranks that it refuses are left out.

    Args:
        method: any.
        model: the base model, which is not changed.
        count: trained elements.
        inputs, labels: the target's windows, as for :meth:`Method.begin`.

    Returns:
        The rank; None if every rank has the same count, so that the method has no choice.

    Raises:
        NotApplicableError: the method has nothing to train in this model.
        ValueError: it refuses every rank; the message is that of the last one.
    """
    found: dict[int, int] = {}
    refusal: ValueError | None = None

    def distance(rank: int) -> tuple[float, int]:
        nonlocal refusal
        if rank not in found:
            try:
                found[rank] = method.begin(copy.deepcopy(model), rank, inputs, labels).count
            except NotApplicableError:
                raise
            except ValueError as error:
                refusal = error
                return float("inf"), rank
        return abs(found[rank] - count), rank

    best = min(LADDER, key=distance)
    if not found:
        assert refusal is not None
        raise refusal
    if len(set(found.values())) == 1 and len(found) > 1:
        return None
    step = best // 2
    while step:
        best = min((best - step, best, best + step), key=distance)
        step //= 2
    return best
