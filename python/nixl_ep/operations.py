"""Dispatch and combine beside the call into the library: what a call covers, what travels, its handle and its results."""
from typing import Any, NamedTuple, Optional, Tuple

from . import _native
from .errors import integer, native_call, require
from .results import Handle
from .tensors import Allocator, address, check, torch

WHOLE, SEND, RECEIVE = 0, 1, 2  # parts of an operation
BFLOAT16, FP8, FP8_POW2, FP8_UE8M0 = range(4)  # nixl::ep::Payload


class Extent(NamedTuple):
    """The sizes that one operation has on every rank."""

    experts: int  # L
    ranks: int  # R
    bound: int  # M
    hidden: int  # H

    @property
    def rows(self) -> int:
        """T."""
        return self.ranks * self.bound


def payload_of(use_fp8: bool, round_scale: bool, use_ue8m0: bool, hidden: int) -> int:
    """The number of nixl::ep::Payload."""
    require(not use_ue8m0 or (round_scale and use_fp8), "use_ue8m0 needs use_fp8 and round_scale")
    unit = 512 if use_ue8m0 else 128 if use_fp8 else 8
    kind = "ue8m0" if use_ue8m0 else "fp8" if use_fp8 else "bfloat16"
    require(hidden > 0 and hidden % unit == 0, f"the hidden size is {hidden}; {kind} dispatch needs a multiple of {unit}")
    if not use_fp8:
        return BFLOAT16
    return FP8_UE8M0 if use_ue8m0 else FP8_POW2 if round_scale else FP8


def ranks_covered(num_experts: Optional[int], experts_per_rank: int, active_rank_bound: int, capacity: int) -> int:
    """R of a call with this num_experts."""
    if num_experts is None:
        return active_rank_bound
    number = integer("num_experts", num_experts)
    low, high = active_rank_bound * experts_per_rank, capacity * experts_per_rank
    require(number % experts_per_rank == 0 and low <= number <= high,
            f"num_experts is {number}; multiples of {experts_per_rank} from {low} (highest active rank {active_rank_bound - 1}) "
            f"to {high} are allowed")
    return number // experts_per_rank


def check_bound(value: int, tokens: int) -> int:
    """num_max_dispatch_tokens_per_rank of a call with so many tokens."""
    bound = integer("num_max_dispatch_tokens_per_rank", value)
    require(0 < bound, f"num_max_dispatch_tokens_per_rank is {bound}; it must be positive")
    require(tokens <= bound, f"x has {tokens} tokens; num_max_dispatch_tokens_per_rank is {bound}")
    return bound


def check_room(extent: Extent, capacity: int, num_rdma_bytes: int) -> None:
    """Raises unless a buffer of so many ranks and bytes serves the operation."""
    needed = native_call(_native.size_hint, extent.bound, extent.hidden, extent.ranks, capacity * extent.experts)
    require(needed <= num_rdma_bytes,
            f"{extent.bound} tokens of hidden size {extent.hidden} need {needed} bytes; update_memory_buffers got "
            f"{num_rdma_bytes} (get_rdma_size_hint tells how many the largest call needs)")


def check_handle(handle: tuple, experts: int, active_rank_bound: int, capacity: int, device: str) -> Tuple[Any, Any, Extent]:
    """(src_info, layout_range, extent) of the dispatch that returned the handle."""
    require(isinstance(handle, (tuple, list)), f"handle is a {type(handle).__name__}; the tuple that dispatch returned is needed")
    require(len(handle) in (4, 5), f"handle has {len(handle)} entries; the tuple that dispatch returned has 4")
    t = torch()
    src_info, layout_range, bound, hidden = handle[:4]
    check("layout_range of the handle", layout_range, (t.int64,), (experts, None), device)
    ranks = layout_range.shape[1]
    require(active_rank_bound <= ranks <= capacity,
            f"the handle covers {ranks} ranks; from {active_rank_bound} (highest active rank {active_rank_bound - 1}) to "
            f"{capacity} are allowed")
    require(isinstance(bound, int) and isinstance(hidden, int) and bound > 0 and hidden > 0,
            f"the handle's sizes are {bound!r} and {hidden!r}; positive integers are needed")
    extent = Extent(experts, ranks, bound, hidden)
    check("src_info of the handle", src_info, (t.int32,), (experts, extent.rows), device)
    return src_info, layout_range, extent


class Received:
    """The tensors that one dispatch fills.

    Arguments:
        weighted: top-k weights travel too.
        record_bytes: size of Handle.records, 0 for none.
    """

    def __init__(self, allocator: Allocator, extent: Extent, payload: int, weighted: bool, record_bytes: int) -> None:
        t, empty = torch(), allocator.empty
        experts, rows, hidden = extent.experts, extent.rows, extent.hidden
        self._x = empty((experts, rows, hidden), t.float8_e4m3fn if payload else t.bfloat16)
        self._scales = None  # by channel group, then by row
        if payload:
            groups, dtype = (hidden // 512, t.int32) if payload == FP8_UE8M0 else (hidden // 128, t.float32)
            self._scales = empty((experts, groups, rows), dtype)
        self.count = empty((experts,), t.int32)
        self.handle = Handle((empty((experts, rows), t.int32), empty((experts, extent.ranks), t.int64), extent.bound, hidden))
        if weighted:
            self.handle.weights, self.handle.places = empty((experts, rows), t.float32), empty((experts, rows), t.uint8)
        if record_bytes:
            self.handle.records = self.handle[0].nixl_records = empty((record_bytes,), t.uint8)

    def give_to(self, args: Any) -> None:
        """Makes them the outputs of a native dispatch."""
        handle = self.handle
        args.outputs(address(self._x), address(self._scales), address(self.count), address(handle[0]), address(handle[1]),
                     address(handle.weights), address(handle.places), address(handle.records))

    @property
    def recv_x(self) -> Any:
        """As dispatch returns it: the rows, or rows and scales."""
        return self._x if self._scales is None else (self._x, self._scales.transpose(1, 2))

    def tensors(self) -> tuple:
        """What must live until the operation has passed."""
        handle = self.handle
        return self._x, self._scales, self.count, handle, handle.weights, handle.places, handle.records
