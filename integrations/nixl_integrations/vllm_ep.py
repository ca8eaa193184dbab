"""vLLM's elastic expert parallelism on nixl_ep: the all-to-all manager and the prepare/finalize pair, by vLLM's names and call order.

vLLM itself is not imported. One Buffer a process outlives the managers, which vLLM makes anew at every resize.
"""
import os
import threading
from typing import Any, NamedTuple, Optional

import torch
import torch.distributed as dist

CAPACITY_VARIABLE, DEFAULT_CAPACITY = "VLLM_NIXL_EP_MAX_NUM_RANKS", 32


class BufferState(NamedTuple):
    """The process's buffer and the number of ranks it is connected to."""

    buffer: Any
    ep_size: int


class _Sizes(NamedTuple):
    tokens: int
    hidden: int
    experts_per_rank: int
    capacity: int


class NixlEPAll2AllManager:
    """Keeps the process's Buffer connected to the ranks of the current group. Safe from any threads."""

    _buffer: Optional[BufferState] = None
    _sizes: Optional[_Sizes] = None
    _staged: Optional[int] = None  # size asked for by the last staged resize
    _lock = threading.RLock()

    def __init__(self, cpu_group, tcp_store_group=None):
        self.cpu_group = cpu_group
        self.rank, self.world_size = cpu_group.rank(), cpu_group.size()
        self.max_num_ep_ranks = int(os.environ.get(CAPACITY_VARIABLE, DEFAULT_CAPACITY))
        self.store = tcp_store_group.store if tcp_store_group is not None else dist.PrefixStore("nixl_ep", _store_of(cpu_group))

    def get_handle(self, kwargs):
        """The Buffer, connected to `num_ep_ranks` ranks. `stage`: the ranks to come are wired and stay masked, leavers stay, until
        commit_staged_state()."""
        cls = NixlEPAll2AllManager
        with cls._lock:
            size = kwargs["num_ep_ranks"]
            if cls._buffer is None:
                self._open(kwargs, size)
            elif size != cls._buffer.ep_size:
                self._resize(size, kwargs.get("stage", False))
            return cls._buffer.buffer

    def commit_staged_state(self):
        """Ends what get_handle(stage=True) began: leavers go, newcomers serve."""
        cls = NixlEPAll2AllManager
        with cls._lock:
            if cls._staged is None:
                return
            (buffer, old), size, cls._staged = cls._buffer, cls._staged, None
            if size < old:
                buffer.disconnect_ranks(list(range(size, old)))
            else:
                buffer.connect_ranks(list(range(old, size)), activate=False)  # those staged are connected already
                for rank in range(old, size):
                    buffer.update_mask_buffer(rank, mask=False)
            cls._buffer = BufferState(buffer, size)

    def _open(self, kwargs, size):
        from nixl_ep import Buffer

        cls = NixlEPAll2AllManager
        capacity = max(self.max_num_ep_ranks, size)
        experts_per_rank = kwargs["num_global_experts"] // size
        sizes = _Sizes(kwargs["max_num_tokens_per_dp_rank"], kwargs["token_hidden_size"], experts_per_rank, capacity)
        buffer = Buffer(rank=self.rank, tcp_store_group=self.store)
        _allocate(buffer, sizes)
        buffer.connect_ranks(list(range(size)))
        cls._buffer, cls._sizes, cls._staged = BufferState(buffer, size), sizes, None

    def _resize(self, size, stage):
        cls = NixlEPAll2AllManager
        buffer, old = cls._buffer
        if size > cls._sizes.capacity:
            cls._sizes = cls._sizes._replace(capacity=size)
            _allocate(buffer, cls._sizes)
        buffer.set_tcp_store_group(self.store)
        if stage:
            cls._staged = size
            if size > old:
                buffer.connect_ranks(list(range(old, size)), activate=False)
            return
        if size > old:
            buffer.connect_ranks(list(range(old, size)))
        else:
            buffer.disconnect_ranks(list(range(size, old)))
        cls._buffer, cls._staged = BufferState(buffer, size), None

    def destroy(self):
        """The Buffer stays, for the next manager of this process; its store does not."""
        cls = NixlEPAll2AllManager
        with cls._lock:
            if cls._buffer is not None:
                cls._buffer.buffer.set_tcp_store_group(None)

    def max_sms_used(self):
        """SMs held between send and receive: none."""
        return 0

    def dispatch(self, *args, **kwargs):
        """Not by this object."""
        raise NotImplementedError("tokens are dispatched by NixlEPPrepareAndFinalize")

    def combine(self, *args, **kwargs):
        """Not by this object."""
        raise NotImplementedError("tokens are combined by NixlEPPrepareAndFinalize")


def _allocate(buffer, sizes):
    num_bytes = buffer.get_rdma_size_hint(num_max_dispatch_tokens_per_rank=sizes.tokens, hidden=sizes.hidden, num_ranks=sizes.capacity,
                                          num_experts=sizes.capacity * sizes.experts_per_rank)
    buffer.update_memory_buffers(num_ranks=sizes.capacity, num_experts_per_rank=sizes.experts_per_rank, num_rdma_bytes=num_bytes)


def _store_of(group):
    of_group = getattr(dist.distributed_c10d, "_get_process_group_store", None)
    return of_group(group) if of_group else dist.distributed_c10d._get_default_store()


class Prepared(NamedTuple):
    """What the experts of this rank are given: rows [L, T, H] (with scales when FP8), and how many of them are valid."""

    expert_x: Any
    expert_x_scale: Any
    expert_num_tokens: Any


class NixlEPPrepareAndFinalize:
    """Dispatch before the experts and combine after them, with fixed shapes for the capacity, so that captured graphs survive a resize.

    use_fp8_dispatch: rows travel as FP8 where the experts want FP8 in blocks of [128, 128]; everything else travels as BF16 and is
    quantised where it arrives. ubatch_id: which micro-batch runs; any number of them may be under way.
    """

    def __init__(self, buffer, max_tokens_per_rank, num_dispatchers, use_fp8_dispatch=False, use_ue8m0=False, ubatch_id=lambda: 0):
        self.buffer = buffer
        self.max_tokens_per_rank = max_tokens_per_rank
        self.use_fp8_dispatch, self.use_ue8m0 = use_fp8_dispatch, use_ue8m0
        self._num_dispatchers = num_dispatchers
        self._ubatch_id = ubatch_id
        self.handles, self._pending = {}, {}  # by micro-batch

    def num_dispatchers(self):
        """Ranks whose tokens arrive here."""
        return self._num_dispatchers

    def max_num_tokens_per_rank(self):
        """M."""
        return self.max_tokens_per_rank

    def topk_indices_dtype(self):
        """dtype that ids are turned into."""
        from nixl_ep import topk_idx_t

        return topk_idx_t

    def output_is_reduced(self):
        """Combine sums over the top-k."""
        return True

    def supports_async(self):
        """prepare_async and finalize_async exist."""
        return True

    @staticmethod
    def maybe_roundup_layer_hidden_size(hidden_size, use_ue8m0=False):
        """The next hidden size that can be dispatched."""
        unit = 512 if use_ue8m0 else 128
        return -(-hidden_size // unit) * unit

    def _travels_as_fp8(self, quant_config):
        return (self.use_fp8_dispatch and getattr(quant_config, "quant_dtype", None) is torch.float8_e4m3fn and
                list(getattr(quant_config, "block_shape", None) or ()) == [128, 128])

    def prepare_async(self, a1, topk_weights, topk_ids, num_experts, expert_map=None, apply_router_weight_on_input=False,
                      quant_config=None):
        """Sends the tokens. Returns (hook, receiver): the hook receives, the receiver gives Prepared afterwards."""
        if a1.shape[-1] % 128:
            raise ValueError(f"hidden size {a1.shape[-1]}: a multiple of 128 is needed (maybe_roundup_layer_hidden_size)")
        if apply_router_weight_on_input:
            if topk_ids.shape[1] != 1:
                raise ValueError(f"weights are applied to the input with top-k 1 only, not {topk_ids.shape[1]}")
            a1 = a1 * topk_weights.to(a1.dtype)
        fp8 = self._travels_as_fp8(quant_config)
        ue8m0 = self.use_ue8m0 and fp8
        received, count, handle, _, hook = self.buffer.dispatch(
            a1, topk_ids.to(self.topk_indices_dtype()), self.max_tokens_per_rank, num_experts, use_fp8=fp8, round_scale=ue8m0,
            use_ue8m0=ue8m0, async_finish=False, return_recv_hook=True)
        self.handles[self._ubatch_id()] = handle
        return hook, lambda: self._received(received, count, quant_config, fp8)

    def prepare(self, *args, **kwargs):
        """prepare_async and its hook: Prepared."""
        hook, receiver = self.prepare_async(*args, **kwargs)
        hook()
        return receiver()

    @staticmethod
    def _received(received, count, quant_config, fp8):
        if fp8:
            return Prepared(received[0], received[1], count)
        dtype = getattr(quant_config, "quant_dtype", None)
        if dtype is None:
            return Prepared(received, None, count)
        rows = torch.arange(received.shape[1], device=received.device) < count[:, None]  # what lies behind is undefined
        scale = received.masked_fill(~rows[:, :, None], 0).float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-4)
        if not getattr(quant_config, "per_act_token_quant", True):
            scale = scale.amax(dim=1, keepdim=True).expand_as(scale)
        limit = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
        scaled = (received.float() * (limit / scale)).clamp(-limit, limit)
        return Prepared((scaled if dtype.is_floating_point else scaled.round()).to(dtype), scale / limit, count)

    def finalize_async(self, output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input=False):
        """Sends the experts' rows home. Returns (hook, receiver); `output` is written when the hook has run."""
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights)
        ubatch = self._ubatch_id()
        self._run_pending(ubatch)
        _, _, hook = self.buffer.combine(fused_expert_output, topk_ids.to(self.topk_indices_dtype()), topk_weights,
                                         self.handles[ubatch], async_finish=False, zero_copy=False, return_recv_hook=True, out=output)
        self._pending[ubatch] = hook
        return lambda: self._run_pending(ubatch), lambda: output

    def finalize(self, *args, **kwargs):
        """finalize_async and its hook: the output."""
        hook, receiver = self.finalize_async(*args, **kwargs)
        hook()
        return receiver()

    def _run_pending(self, ubatch):
        hook = self._pending.pop(ubatch, None)
        if hook is not None:
            hook()


class MaskWatch:
    """Tells when the masks of the first `num_active` ranks differ from the last look."""

    def __init__(self, buffer, num_active):
        self._buffer, self._num_active = buffer, num_active
        self._mask = torch.empty(buffer.group_size, dtype=torch.int32, device=buffer.fault_tensor().device)
        self._seen = self.look()

    def look(self):
        """Masks now, one a rank; waits for the device."""
        self._buffer.query_mask_buffer(self._mask)
        return self._mask[:self._num_active].tolist()

    def changed(self):
        """Ranks whose mask is another than at the last call."""
        before, self._seen = self._seen, self.look()
        return [rank for rank, (old, new) in enumerate(zip(before, self._seen)) if old != new]


def recover(buffer, barrier=lambda: None):
    """Starts anew on all ranks after a fault that is over: collective, with no operation under way. `barrier` keeps the ranks together."""
    exposed = buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True)
    for step in (exposed.zero_, buffer.clean_mask_buffer):
        step()
        if exposed.is_cuda:
            torch.cuda.synchronize()
        barrier()
