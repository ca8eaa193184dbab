"""What operations hand out besides tensors: handles and faults."""
from typing import Any, NamedTuple, Optional

PHASES = ("dispatch", "combine", "barrier")  # by number


class Fault(NamedTuple):
    """A peer that did not keep a deadline, or whose flag did not fit.

    operation counts this rank's operations; phase is "dispatch", "combine" or "barrier"; expected and seen are flag words,
    sender's incarnation << 32 | its count of operations sent here.
    """

    rank: int
    operation: int
    phase: str
    expected: int
    seen: int


class Handle(tuple):
    """(src_info int32 [L, T], layout_range int64 [L, R], M, H), as combine needs it.

    src_info holds each row's token index at its source; layout_range[e, r] = first row << 32 | count. When weights travelled
    with dispatch, `weights` (float32 [L, T]) and `places` (uint8 [L, T]) hold each row's weight and its place in the top-k.
    `records` (uint8) is what dispatch notes for its combines on CUDA; src_info carries it too, so that a plain tuple of the same
    tensors serves as a handle.
    """

    weights: Optional[Any] = None
    places: Optional[Any] = None
    records: Optional[Any] = None
