"""Buffer: one rank's membership in an expert-parallel group, and its operations.

Letters in shapes: ``L`` experts a rank, ``E = capacity * L`` experts in all, ``R`` ranks covered by one call, ``M`` most
tokens a rank sends in the call, ``T = R * M``, ``H`` hidden size, ``K`` top-k, ``n`` tokens of this call. Expert ``e`` lives
at rank ``e // L``.
"""
import math
import os
from typing import Any, Callable, List, Optional, Sequence, Tuple

from . import _native, layout, operations
from .agreement import Agreements
from .config import COMBINE, DISPATCH, Config, recommended
from .construction import DEFAULT_TIMEOUT_MS, SIGNATURE, Arguments, choose, parse  # noqa: F401
from .errors import NixlEpError, integer, native_call, require
from .results import PHASES, Fault, Handle
from .runtime import Runtime
from .stores import StoreOfTorch
from .streams import Streams
from .tensors import Allocator, Ranks, address, check, extents, rank_list, torch
from .utils import EventHandle, EventOverlap

_DEVICES = {"cpu": 0, "cuda": 1}
_COMBINES = {"exact": 0, "reduced": 1}


class Buffer:
    """One rank's membership in an expert-parallel group.

    Life: construct, :meth:`update_memory_buffers` once, :meth:`connect_ranks` any number of times, operations,
    :meth:`disconnect_ranks`, ..., :meth:`destroy`. A rank id may leave and come back as a new process.

    Arguments (HEAD order; the README's ``Buffer(rank, ...)`` and release 0.9's ``Buffer(nvlink_backend, ...)`` work too):
        disable_ll_nvlink: do not use NVLink between GPUs.
        explicitly_destroy: :meth:`destroy` will be called; without it the memory goes with the object.
        rank: this rank's id.
        low_latency_mode: False selects the high-throughput mode, which is not in this release.
        group, comm: a process group or communicator; at most one, kept for the caller.
        tcp_store_group: a c10d store for rendezvous (set, wait, multi_get, delete_key are used).
        timeout_ms: limit of every wait for a peer inside an operation, wall time.
        device: "cuda" or "cpu"; default from NIXL_EP_DEVICE, else "cuda".
        combine: "exact" or "reduced" summation, the same on all ranks (reduced: so is whether combine gets a hook); default from
            NIXL_EP_COMBINE, else exact on the CPU, reduced on CUDA.

    Raises:
        NixlEpError: the device cannot be used here; the text says why.
    """

    num_sms: int = 20

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.runtime: Optional[Runtime] = None
        self.explicitly_destroy = False
        arguments = parse(args, kwargs)
        self.rank = arguments.rank
        self.group_size = 0
        self.low_latency_mode = bool(arguments.low_latency_mode)
        self.timeout_ms = arguments.timeout_ms
        self.explicitly_destroy = bool(arguments.explicitly_destroy)
        self.group = arguments.group
        self.comm = arguments.comm
        self.tcp_store_group = None
        self.num_nvl_bytes = 0
        self.num_rdma_bytes = 0
        self._device = choose("device", arguments.device, "NIXL_EP_DEVICE", "cuda", _DEVICES)
        default_combine = "exact" if self._device == "cpu" else "reduced"
        self._combine = choose("combine", arguments.combine, "NIXL_EP_COMBINE", default_combine, _COMBINES)
        self._experts_per_rank = 0
        self._device_id = 0
        self._agreements = Agreements(self.rank)
        self.runtime = Runtime(self._open(arguments), self)
        self._streams = Streams(self._device, self._device_id)
        self._allocator = Allocator("cpu" if self._device == "cpu" else f"cuda:{self._device_id}")
        if arguments.tcp_store_group is not None:
            self.set_tcp_store_group(arguments.tcp_store_group)

    __init__.__signature__ = SIGNATURE

    def _open(self, arguments: Arguments) -> Any:
        if self._device == "cuda":
            reason = _native.cuda_unavailable_reason()
            require(not reason, f"Buffer needs a CUDA device: {reason}. NIXL_EP_DEVICE=cpu or device='cpu' selects the CPU path")
            self._device_id = torch().cuda.current_device()
        text = os.environ.get("NIXL_EP_CONNECT_TIMEOUT_MS") or "300000"
        require(text.isascii() and text.isdigit(), f"NIXL_EP_CONNECT_TIMEOUT_MS is {text!r}; milliseconds are needed")
        connect_ms = integer("NIXL_EP_CONNECT_TIMEOUT_MS", int(text), 64)
        return native_call(_native.Buffer, self.rank, _DEVICES[self._device], _COMBINES[self._combine], self.timeout_ms,
                            connect_ms, not arguments.disable_ll_nvlink)

    def __del__(self) -> None:
        try:
            if self.runtime is not None and self.explicitly_destroy:
                import warnings

                warnings.warn(f"nixl_ep.Buffer of rank {self.rank} was not destroyed; destroy() releases it in time",
                              ResourceWarning, stacklevel=2)
            self.runtime = None
        except Exception:  # the interpreter may be half gone
            pass

    # ------------------------------------------------------------------------------------------------------- life

    def destroy(self) -> None:
        """Leaves the group and releases everything. Needs explicitly_destroy.

        Operations that were queued may end first, since peers count on what they send: up to a second, at most timeout_ms.
        """
        require(self.explicitly_destroy, "destroy() needs a buffer made with explicitly_destroy=True")
        native = self._native()
        self.runtime = None
        native_call(native.destroy)

    def _native(self) -> Any:
        if self.runtime is None:
            raise NixlEpError(f"this Buffer of rank {self.rank} was destroyed")
        return self.runtime.native

    def _ready(self) -> Any:
        native = self._native()
        require(self.group_size > 0, "no memory yet: call update_memory_buffers() first")
        return native

    def update_memory_buffers(self, num_ranks: int, num_experts_per_rank: int, num_rdma_bytes: int,
                              num_nvl_bytes: int = 0) -> None:
        """Allocates for up to `num_ranks` ranks of `num_experts_per_rank` experts each.

        num_rdma_bytes: from :meth:`get_rdma_size_hint`, a multiple of 128. A later call may raise num_ranks (connections
        stay, captured graphs stay valid) and num_rdma_bytes; anything else raises.
        """
        native = self._native()
        num_ranks = integer("num_ranks", num_ranks)
        num_experts_per_rank = integer("num_experts_per_rank", num_experts_per_rank)
        num_rdma_bytes, num_nvl_bytes = integer("num_rdma_bytes", num_rdma_bytes, 64), integer("num_nvl_bytes", num_nvl_bytes, 64)
        require(num_nvl_bytes >= 0 and num_nvl_bytes % 128 == 0,
                f"num_nvl_bytes is {num_nvl_bytes}; a multiple of 128 from 0 is allowed")
        native_call(native.update_memory, num_ranks, num_experts_per_rank, num_rdma_bytes)
        self.group_size = num_ranks
        self.num_rdma_bytes = num_rdma_bytes
        self.num_nvl_bytes = num_nvl_bytes
        self._experts_per_rank = num_experts_per_rank

    def set_tcp_store_group(self, tcp_store_group: Optional[Any]) -> None:
        """The store for coming connects; None: none."""
        native = self._native()
        store = None if tcp_store_group is None else StoreOfTorch(tcp_store_group)
        native_call(native.set_store, store)
        self.tcp_store_group = tcp_store_group

    def connect_ranks(self, remote_ranks: Ranks, activate: bool = True) -> None:
        """Connects to the listed ranks; returns when each of them has named this one too.

        Own rank and connected ids are passed over. activate=False leaves the new ranks masked, to be committed later with
        ``update_mask_buffer(rank, False)``; it may run on another thread while this one dispatches. Bounded by
        NIXL_EP_CONNECT_TIMEOUT_MS (300000).

        Raises:
            NixlEpError: naming the ranks that are missing and why; nothing of the new ranks is left then.
        """
        native = self._ready()
        if not self.low_latency_mode and not activate:
            raise ValueError("connect_ranks(activate=False) needs low_latency_mode=True")
        if native_call(native.connect, rank_list("remote_ranks", remote_ranks), bool(activate)):
            self._agreements.restart()

    def disconnect_ranks(self, remote_ranks: Ranks) -> None:
        """Drops connected ranks, dead ones included: masks them, waits for running operations, releases their memory."""
        native_call(self._ready().disconnect, rank_list("remote_ranks", remote_ranks))

    # ------------------------------------------------------------------------------------------------------- sizes

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether this build holds CUDA kernels."""
        from .nixl_ep_cpp import is_sm90_compiled

        return is_sm90_compiled()

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """SMs for the configurations that get_dispatch_config and get_combine_config recommend; even."""
        number = integer("new_num_sms", new_num_sms)
        require(number >= 0 and number % 2 == 0, f"the number of SMs is {number}; an even number from 0 is needed")
        Buffer.num_sms = number

    @staticmethod
    def capture() -> EventOverlap:
        """An event recorded in the current stream now."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_buffer_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int,
                                         num_experts: int) -> int:
        """Bytes for update_memory_buffers that suffice for every later call with up to these tokens and hidden size."""
        return layout.size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    get_rdma_size_hint = get_low_latency_buffer_size_hint

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Recommended high-throughput dispatch configuration; nearest lower rank count."""
        return recommended(DISPATCH, num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Recommended high-throughput combine configuration; nearest lower rank count."""
        return recommended(COMBINE, num_ranks, Buffer.num_sms)

    def get_comm_stream(self) -> Any:
        """The high-priority torch.cuda.Stream of asynchronous operations, always the same."""
        return self._streams.comm()

    def get_local_buffer_tensor(self, dtype: Any, size: Optional[Sequence[int]] = None, offset: int = 0,
                                use_rdma_buffer: bool = False) -> Any:
        """Memory of this buffer from byte `offset`: 1-D of `dtype`, or its head in the shape `size`.

        It may be overwritten between operations, on each rank when it likes: nothing in flight lies in it. There is no separate
        NVLink buffer, so use_rdma_buffer changes nothing. The tensor keeps its memory, also after destroy().
        """
        native = self._ready()
        require(isinstance(dtype, torch().dtype), f"dtype is {dtype!r}; a torch dtype is needed")
        whole = native_call(native.data_bytes)
        item, offset = dtype.itemsize, integer("offset", offset, 64)
        require(0 <= offset <= whole and offset % item == 0,
                f"offset is {offset} bytes; multiples of {item} from 0 to {whole} are allowed")
        room = (whole - offset) // item
        shape = (room,) if size is None else extents("size", size)
        count = math.prod(shape)
        require(count <= room, f"size {shape} needs {count} elements of {dtype}; there are {room} from offset {offset}")
        memory = native_call(native.data_memory, offset, count * item, _DEVICES[self._device], self._device_id)
        return torch().from_dlpack(memory).view(dtype).view(shape)

    def clean_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Zeroes the exchanged memory; never needed, kept for programs that call it."""
        self.get_local_buffer_tensor(torch().int8, use_rdma_buffer=True).zero_()

    # ------------------------------------------------------------------------------------------------------- masks

    def update_mask_buffer(self, rank_to_mask: Ranks, mask: bool = False) -> None:
        """Masks (mask=True) or unmasks a rank, a list of ranks, or a tensor of them; takes effect on the current stream."""
        native = self._ready()
        native_call(native.mask, rank_list("rank_to_mask", rank_to_mask), bool(mask), self._streams.of_change())

    def query_mask_buffer(self, mask_status: Any) -> None:
        """Fills an int32 tensor of `capacity` elements: 0 active, 1 masked, -1 never connected. Asynchronous on the current
        stream."""
        native = self._checked()
        check("mask_status", mask_status, (torch().int32,), (None,) * getattr(mask_status, "ndim", 1), self._device)
        require(mask_status.numel() == self.group_size,
                f"mask_status has {mask_status.numel()} elements; {self.group_size}, one a rank, are needed")
        native_call(native.query_masks, address(mask_status), self._streams.current())

    def clean_mask_buffer(self) -> None:
        """Unmasks every connected rank."""
        native_call(self._ready().clean_masks, self._streams.of_change())

    def active_ranks(self) -> Tuple[List[int], List[int]]:
        """(ranks active by the API, ranks active on the device now): a timeout changes the second only."""
        native = self._ready()
        status = torch().empty((self.group_size,), dtype=torch().int32, device=self._device)
        self.query_mask_buffer(status)
        return native_call(native.active_ranks), [rank for rank, masked in enumerate(status.tolist()) if masked == 0]

    def fault_status(self) -> List[Fault]:
        """Faults since the last call, oldest first; does not wait for the device."""
        return [Fault(rank, operation, PHASES[phase], expected, seen)
                for rank, operation, phase, expected, seen in native_call(self._ready().take_faults)]

    def fault_tensor(self) -> Any:
        """int32 [capacity] on the device: nonzero = failed in the newest operation. Usable, then unchanging, after destroy()."""
        view = native_call(self._ready().fault_view, _DEVICES[self._device], self._device_id)
        return torch().from_dlpack(view).view(torch().int32)

    def agree_mask(self, store: Any) -> List[int]:
        """All callers mask the union of what each of them has masked; returns it, sorted.

        Every rank that is not masked calls it the same number of times since ranks were last connected. Ranks that do not
        answer within timeout_ms are masked too. store: a c10d store; keys live under "NIXL_EP/agree/" and are deleted two
        calls later, when nobody can need them any more, or at the next connect.
        """
        active = set(self.active_ranks()[1])
        mine = set(native_call(self._native().connected_ranks)) - active
        union = self._agreements.union(store, mine, active, self.timeout_ms / 1000)
        newly = sorted((union - mine) & active - {self.rank})
        if newly:
            self.update_mask_buffer(newly, True)
        return sorted(union)

    def barrier(self) -> None:
        """Meets every unmasked peer on the current stream; one that does not come within timeout_ms is masked.

        On CUDA not between an operation's send phase and its hook.
        """
        native_call(self._checked().barrier, self._streams.current())

    # -------------------------------------------------------------------------------------------------- operations

    def low_latency_dispatch(
        self, x: Any, topk_idx: Any, num_max_dispatch_tokens_per_rank: int, num_experts: Optional[int] = None,
        cumulative_local_expert_recv_stats: Optional[Any] = None, dispatch_wait_recv_cost_stats: Optional[Any] = None,
        use_fp8: bool = True, round_scale: bool = False, use_ue8m0: bool = False, async_finish: bool = False,
        return_recv_hook: bool = False, topk_weights: Optional[Any] = None,
    ) -> Tuple[Any, Any, Handle, EventOverlap, Optional[Callable[[], None]]]:
        """Sends each token to the ranks of its experts; receives, expert by expert, what others sent here.

        Arguments:
            x: bfloat16 [n, H], contiguous; 0 <= n <= M. H a multiple of 128 (of 8 without fp8, of 512 for ue8m0).
            topk_idx: int32 or int64 [n, K], contiguous; negative ids are skipped, ids of absent ranks are dropped.
            num_max_dispatch_tokens_per_rank: M, equal on all ranks.
            num_experts: covers R = num_experts // L ranks; None: up to the highest active rank.
            cumulative_local_expert_recv_stats: int32 [L]; counts are added.
            dispatch_wait_recv_cost_stats: int64 [R]; time waited for each source is added (ns; on CUDA clock cycles).
            use_fp8, round_scale, use_ue8m0: E4M3 values in groups of 128 channels; scales as powers of two; as exponents.
            async_finish: the event of the result must be waited for. return_recv_hook: only the send phase runs now.
            topk_weights: float32 [n, K]; sent along, so that a combine in hook mode can be reduced.

        Returns:
            recv_x: bfloat16 [L, T, H], or with fp8 a pair of float8_e4m3fn [L, T, H] and scales float32 [L, T, H/128] with
                strides (H/128*T, 1, T) (ue8m0: int32 [L, T, H/512], strides (H/512*T, 1, T)). Rows past the count are
                undefined. Rows stand by source rank, then by token.
            recv_count: int32 [L].
            handle: see :class:`Handle`.
            event: its ``event`` is None unless async_finish.
            hook: None unless return_recv_hook; call it to receive.
        """
        native = self._operation()
        t = torch()
        check("x", x, (t.bfloat16,), (None, None), self._device)
        tokens, hidden = x.shape
        check("topk_idx", topk_idx, (t.int32, t.int64), (tokens, None), self._device)
        topk = topk_idx.shape[1]
        if topk_weights is not None:
            check("topk_weights", topk_weights, (t.float32,), (tokens, topk), self._device)
        require(not (async_finish and return_recv_hook), "async_finish and return_recv_hook exclude each other")
        payload = operations.payload_of(use_fp8, round_scale, use_ue8m0, hidden)
        bound, experts = operations.check_bound(num_max_dispatch_tokens_per_rank, tokens), self._experts_per_rank
        ranks = operations.ranks_covered(num_experts, experts, native_call(native.active_rank_bound), self.group_size)
        extent = operations.Extent(experts, ranks, bound, hidden)
        operations.check_room(extent, self.group_size, self.num_rdma_bytes)
        stats, costs = cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats
        if stats is not None:
            check("cumulative_local_expert_recv_stats", stats, (t.int32,), (experts,), self._device)
        if costs is not None:
            check("dispatch_wait_recv_cost_stats", costs, (t.int64,), (ranks,), self._device)

        record_bytes = native_call(_native.record_bytes, _DEVICES[self._device], bound, topk, ranks)
        args = _native.Dispatch(
            address(x), tokens, hidden, address(topk_idx), topk, topk_idx.element_size(), address(topk_weights), bound, ranks,
            payload, address(stats), address(costs), self._streams.of_operation(async_finish))
        received = operations.Received(self._allocator, extent, payload, topk_weights is not None, record_bytes)
        received.give_to(args)
        keep = (x, topk_idx, topk_weights, stats, costs, *received.tensors())
        event, hook = self._run(native.dispatch, args, async_finish, return_recv_hook, keep)
        return received.recv_x, received.count, received.handle, event, hook

    def dispatch(self, *args: Any, **kwargs: Any) -> Tuple[Any, Any, Handle, EventOverlap, Optional[Callable[[], None]]]:
        """:meth:`low_latency_dispatch`."""
        return self.low_latency_dispatch(*args, **kwargs)

    def low_latency_combine(
        self, x: Any, topk_idx: Any, topk_weights: Any, handle: tuple, use_logfmt: bool = False, zero_copy: bool = False,
        async_finish: bool = False, return_recv_hook: bool = False, out: Optional[Any] = None,
        combine_wait_recv_cost_stats: Optional[Any] = None,
    ) -> Tuple[Any, EventOverlap, Optional[Callable[[], None]]]:
        """Brings the experts' rows home and sums them: row i = sum over k of weights[i, k] * row(topk_idx[i, k], i).

        Arguments:
            x: bfloat16 [L, T, H], contiguous, rows as dispatch delivered them; ignored with zero_copy (see
                :meth:`get_next_combine_buffer`). Rows past the count are not read.
            topk_idx, topk_weights: as given to dispatch, the ids unchanged: on CUDA, batches of up to 16 tokens rely on it;
                weights float32 [n, K].
            handle: of the dispatch. One handle may be combined several times.
            use_logfmt: rows travel compressed, within 9e-4 of the plain result. Excludes zero_copy.
            out: bfloat16 [n, H], contiguous; written and returned.
            combine_wait_recv_cost_stats: int64 [R]; time waited for each source is added (ns; on CUDA clock cycles).

        Returns:
            combined_x bfloat16 [n, H] (a token with no contribution left is exactly zero), event and hook as in dispatch.
        """
        native = self._operation()
        t = torch()
        src_info, layout_range, (experts, ranks, bound, hidden) = self._check_handle(handle)
        if not zero_copy:
            check("x", x, (t.bfloat16,), (experts, ranks * bound, hidden), self._device)
        check("topk_idx", topk_idx, (t.int32, t.int64), (None, None), self._device)
        tokens, topk = topk_idx.shape
        check("topk_weights", topk_weights, (t.float32,), (tokens, topk), self._device)
        require(tokens <= bound, f"topk_idx has {tokens} tokens; the handle's bound is {bound}")
        require(not (async_finish and return_recv_hook), "async_finish and return_recv_hook exclude each other")
        require(not (use_logfmt and zero_copy), "use_logfmt and zero_copy exclude each other")
        if out is not None:
            check("out", out, (t.bfloat16,), (tokens, hidden), self._device)
        if combine_wait_recv_cost_stats is not None:
            check("combine_wait_recv_cost_stats", combine_wait_recv_cost_stats, (t.int64,), (ranks,), self._device)
        if out is None:
            out = self._allocator.empty((tokens, hidden), t.bfloat16)
        weights, places = getattr(handle, "weights", None), getattr(handle, "places", None)
        records = getattr(handle, "records", None)
        if records is None:
            records = getattr(src_info, "nixl_records", None)
        args = _native.Combine(
            0 if zero_copy else address(x), tokens, hidden, address(topk_idx), topk, topk_idx.element_size(),
            address(topk_weights), bound, ranks, address(out), address(combine_wait_recv_cost_stats),
            self._streams.of_operation(async_finish))
        args.handle(address(src_info), address(layout_range), address(weights), address(places), address(records))
        args.modes(zero_copy, use_logfmt, return_recv_hook)
        keep = (x, topk_idx, topk_weights, handle, weights, places, records, out, combine_wait_recv_cost_stats)
        event, hook = self._run(native.combine, args, async_finish, return_recv_hook, keep)
        return out, event, hook

    def combine(self, *args: Any, **kwargs: Any) -> Tuple[Any, EventOverlap, Optional[Callable[[], None]]]:
        """:meth:`low_latency_combine`."""
        return self.low_latency_combine(*args, **kwargs)

    def get_next_combine_buffer(self, handle: tuple) -> Any:
        """bfloat16 [L, T, H] view (rows may be apart) to be filled with the rows of the next combine(zero_copy=True).

        Any operation in between invalidates it. Its memory is allocated at the first request.
        """
        native = self._operation()
        _, _, (_, ranks, bound, hidden) = self._check_handle(handle)
        view = native_call(native.next_combine_buffer, bound, hidden, ranks, _DEVICES[self._device], self._device_id)
        return torch().from_dlpack(view).view(torch().bfloat16)

    def get_dispatch_layout(
        self, topk_idx: Any, num_experts: int, previous_event: Optional[Any] = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[Any, Optional[Any], Any, Any, EventOverlap]:
        """How many tokens go to each rank, node and expert.

        topk_idx: int32 or int64 [n, K], negative: skip. Returns num_tokens_per_rank int32 [capacity],
        num_tokens_per_rdma_rank int32 [capacity // 8] or None up to 8 ranks, num_tokens_per_expert int32 [num_experts],
        is_token_in_rank bool [n, capacity], event. A token counts once for each rank and node.
        """
        self._ready()
        t = torch()
        check("topk_idx", topk_idx, (t.int32, t.int64), (None, None), self._device)
        num_experts = integer("num_experts", num_experts)
        require(num_experts > 0 and num_experts % self.group_size == 0,
                f"num_experts is {num_experts}; a positive multiple of the {self.group_size} ranks is needed")
        if previous_event is not None and previous_event.event is not None:
            previous_event.event.current_stream_wait()
        result = layout.dispatch_layout(t, topk_idx, num_experts, self.group_size)
        return (*result, EventOverlap(EventHandle(), result) if async_finish else EventOverlap())

    def ht_dispatch(
        self, x: Any, handle: Optional[tuple] = None, num_tokens_per_rank: Optional[Any] = None,
        num_tokens_per_rdma_rank: Optional[Any] = None, is_token_in_rank: Optional[Any] = None,
        num_tokens_per_expert: Optional[Any] = None, topk_idx: Optional[Any] = None, topk_weights: Optional[Any] = None,
        expert_alignment: int = 1, config: Optional[Config] = None, previous_event: Optional[Any] = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple:
        """High-throughput dispatch; not in this release."""
        raise self._no_high_throughput("ht_dispatch")

    def ht_combine(
        self, x: Any, handle: tuple, topk_weights: Optional[Any] = None, bias: Optional[Any] = None,
        config: Optional[Config] = None, previous_event: Optional[Any] = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple:
        """High-throughput combine; not in this release."""
        raise self._no_high_throughput("ht_combine")

    # ----------------------------------------------------------------------------------------------------- inside

    def _no_high_throughput(self, name: str) -> NixlEpError:
        self._native()
        if self.low_latency_mode:
            return NixlEpError(f"{name}() needs low_latency_mode=False; this buffer is in low-latency mode")
        return NixlEpError(f"{name}() is not in this release: only the low-latency mode is; use a buffer with "
                           "low_latency_mode=True and dispatch()/combine()")

    def _operation(self) -> Any:
        """The native buffer, after the checks every operation begins with."""
        native = self._checked()
        require(self.low_latency_mode, "low-latency operations need a buffer with low_latency_mode=True")
        return native

    def _checked(self) -> Any:
        """The native buffer, after raising what an operation found wrong with its input while it ran."""
        native = self._ready()
        error = native_call(native.take_input_error)
        require(not error, f"an earlier operation dropped part of its input: {error}")
        return native

    def _check_handle(self, handle: tuple) -> Tuple[Any, Any, operations.Extent]:
        bound = native_call(self._native().active_rank_bound)
        return operations.check_handle(handle, self._experts_per_rank, bound, self.group_size, self._device)

    def _run(self, call: Callable, args: Any, async_finish: bool, with_hook: bool, keep: tuple):
        if with_hook:
            native_call(call, operations.SEND, args)

            def hook() -> None:
                native_call(call, operations.RECEIVE, args)

            hook.tensors = keep  # they live as long as the hook
            return EventOverlap(), hook
        native_call(call, operations.WHOLE, args)
        if not async_finish:
            return EventOverlap(), None
        return self._streams.event_of_asynchronous(keep), None
