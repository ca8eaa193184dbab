"""SGLang's elastic expert parallelism on nixl_ep: buffer, token dispatcher and argument handling, by SGLang's names and call order.

SGLang itself is not imported; nixl_ep only when a dispatcher or buffer is made.
"""
import enum
import importlib.util
import logging
import os
from typing import Any, NamedTuple, Optional

import torch

from nixl_integrations.elastic_state import ElasticEPStateManager
from nixl_integrations.fault_loop import refresh_active_ranks
from nixl_integrations.tcp_store import create_global_tcp_store, get_global_tcp_store

__all__ = ["DeepEPMode", "ElasticEPStateManager", "MoeA2ABackend", "NixlEPBuffer", "NixlEPCombineInput", "NixlEPDispatchOutput",
           "NixlEPDispatcher", "add_cli_args", "resolve_server_args", "set_up_store"]

logger = logging.getLogger(__name__)

MOST_TOKENS = 1024
ELASTIC_ALGORITHMS = ("elasticity_aware", "elasticity_aware_hierarchical")


class MoeA2ABackend(enum.Enum):
    """All-to-all backends, by the names of the flag."""

    NONE = "none"
    DEEPEP = "deepep"
    MOONCAKE = "mooncake"
    NIXL = "nixl"

    def is_nixl(self):
        """Whether this one is ours."""
        return self is MoeA2ABackend.NIXL


class DeepEPMode(enum.Enum):
    """Modes of the dispatcher; only LOW_LATENCY works here."""

    NORMAL = "normal"
    LOW_LATENCY = "low_latency"
    AUTO = "auto"


def _low_latency_only(mode):
    if DeepEPMode(mode.value if isinstance(mode, enum.Enum) else mode) is not DeepEPMode.LOW_LATENCY:
        raise NotImplementedError("Normal mode is not supported for Nixl EP yet.")


# ---- arguments

def _flag(parser, *names, **about):
    """Adds a flag; where the parser has one of that name, only the choices that it lacks."""
    known = next((action for action in parser._actions if set(names) & set(action.option_strings)), None)
    if known is None:
        parser.add_argument(*names, **about)
    elif known.choices is not None:
        known.choices = [*known.choices, *(one for one in about.get("choices", ()) if one not in known.choices)]


def add_cli_args(parser):
    """Adds the flags that concern NIXL EP to an argparse parser; those that it has already stay."""
    _flag(parser, "--moe-a2a-backend", choices=[one.value for one in MoeA2ABackend], default="none",
          help="how tokens reach experts on other ranks")
    _flag(parser, "--elastic-ep-backend", choices=["none", "mooncake", "nixl"], default=None,
          help="what notices lost ranks; may differ from --moe-a2a-backend")
    _flag(parser, "--eplb-algorithm", choices=["auto", "deepseek", "deepseek_hierarchical", *ELASTIC_ALGORITHMS], default="auto",
          help="placement of expert replicas")
    _flag(parser, "--deepep-mode", choices=[one.value for one in DeepEPMode], default="auto")
    _flag(parser, "--enable-eplb", action="store_true")
    _flag(parser, "--ep-num-redundant-experts", type=int, default=0)
    for short, name in (("tp", "tensor"), ("dp", "data"), ("pp", "pipeline"), ("ep", "expert")):
        _flag(parser, f"--{name}-parallel-size", f"--{short}-size", f"--{short}", dest=f"{short}_size", type=int, default=1)
    _flag(parser, "--enable-dp-attention", action="store_true")
    return parser


def _is_nixl(args):
    backend = getattr(args, "moe_a2a_backend", None)
    return (backend.value if isinstance(backend, enum.Enum) else backend) == "nixl"


def resolve_server_args(args):
    """Brings the arguments in line with each other, in place; AssertionError for what cannot be."""
    if _is_nixl(args) and getattr(args, "ep_size", None) != args.tp_size:
        logger.warning("NIXL EP is on: ep_size becomes tp_size, %s", args.tp_size)
        args.ep_size = args.tp_size
    elastic = getattr(args, "elastic_ep_backend", None)
    if elastic not in (None, "none"):
        if getattr(args, "enable_eplb", False):
            if args.eplb_algorithm == "auto":
                args.eplb_algorithm = "elasticity_aware"
            assert args.eplb_algorithm in ELASTIC_ALGORITHMS, \
                f"--eplb-algorithm {args.eplb_algorithm}: with an elastic backend one of {', '.join(ELASTIC_ALGORITHMS)} is needed"
        pipeline = getattr(args, "pp_size", 1)
        assert pipeline == 1, f"pp_size is {pipeline}; elastic expert parallelism needs 1"
    return args


def set_up_store(args, rank, world_size):
    """The process's store when NIXL EP is on, else None and nothing is made."""
    return create_global_tcp_store(rank, world_size) if _is_nixl(args) else None


def _dispatch_tokens():
    tokens = int(os.environ.get("SGLANG_NIXL_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK", "128"))
    assert tokens <= MOST_TOKENS, \
        f"SGLANG_NIXL_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK is {tokens}; at most {MOST_TOKENS} are allowed"
    return tokens


def _dispatch_bf16():
    return os.environ.get("SGLANG_NIXL_EP_BF16_DISPATCH", "false").lower() in ("1", "true", "yes", "y", "on")


# ---- the buffer

class NixlEPBuffer:
    """The process's one Buffer, and the ranks it is connected to."""

    _buffer: Optional[Any] = None
    _shape = None  # (tokens, hidden, experts)
    _connected = 0  # ranks [0, connected) are
    _target = 0     # ranks that there shall be; taken up at the next dispatch
    _max_ep_size: Optional[int] = None
    _join_rank_offset = 0

    @classmethod
    def configure(cls, max_ep_size=None, ep_join_rank_offset=0):
        """Before the first get_nixl_buffer: how many ranks there may ever be, and which of them this process's group begins with."""
        cls._max_ep_size, cls._join_rank_offset = max_ep_size, ep_join_rank_offset

    @classmethod
    def get_nixl_buffer(cls, group, hidden_size, deepep_mode, num_max_dispatch_tokens_per_rank=-1, num_experts=-1,
                        num_local_experts=-1):
        """The Buffer; made and connected to all ranks at the first call. num_experts: of the group at its start."""
        if cls._buffer is not None:
            return cls._buffer
        _low_latency_only(deepep_mode)
        from nixl_ep import Buffer

        size = group.size()
        if num_experts <= 0 or num_experts % size:
            raise ValueError(f"{num_experts} experts do not divide over {size} ranks")
        if num_max_dispatch_tokens_per_rank <= 0:
            num_max_dispatch_tokens_per_rank = _dispatch_tokens()
        if num_local_experts <= 0:
            num_local_experts = num_experts // size
        store = get_global_tcp_store()
        if store is None:
            raise RuntimeError("there is no global TCPStore: call create_global_tcp_store (set_up_store) before the first dispatcher")
        world = cls._join_rank_offset + size
        capacity = max(cls._max_ep_size or 0, world)
        num_bytes = Buffer.get_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden_size, capacity, capacity * num_local_experts)
        buffer = Buffer(rank=group.rank() + cls._join_rank_offset, tcp_store_group=store)
        buffer.update_memory_buffers(capacity, num_local_experts, num_bytes)
        buffer.connect_ranks(list(range(world)))
        cls._buffer, cls._connected, cls._target = buffer, world, world
        cls._shape = num_max_dispatch_tokens_per_rank, hidden_size, capacity * num_local_experts
        return buffer

    @classmethod
    def set_world_size(cls, num_ranks):
        """The group has this many ranks from the next dispatch on; every rank is told before the same dispatch."""
        cls._target = num_ranks

    @classmethod
    def take_up_resize(cls):
        """Connects or disconnects what the last resize asked for. Called between two operations."""
        if cls._target == cls._connected or cls._buffer is None:
            return
        if cls._target > cls._connected:
            cls._buffer.set_tcp_store_group(get_global_tcp_store())
            cls._buffer.connect_ranks(list(range(cls._connected, cls._target)))
        else:
            cls._buffer.disconnect_ranks(list(range(cls._target, cls._connected)))
        cls._connected = cls._target

    @classmethod
    def clean_buffer(cls):
        """Zeroes the exposed memory, if there is a buffer."""
        if cls._buffer is not None:
            cls._buffer.clean_buffer(*cls._shape)


# ---- the dispatcher

class NixlEPDispatchOutput(NamedTuple):
    """What the experts of this rank are given."""

    hidden_states: Any
    hidden_states_scale: Any
    topk_ids: Any
    topk_weights: Any
    masked_m: Any    # rows of each local expert
    expected_m: int  # of each local expert, on average


class NixlEPCombineInput(NamedTuple):
    """What goes back: rows of the experts [L, T, H], and ids and weights as dispatched."""

    hidden_states: Any
    topk_ids: Any
    topk_weights: Any


class _NixlEPDispatcherImpl:
    """Dispatch and combine in two halves each."""

    def __init__(self, group, num_experts, num_local_experts, hidden_size, deepep_mode, return_recv_hook):
        if importlib.util.find_spec("nixl_ep") is None:
            raise ImportError("the package nixl_ep is not installed; it comes with nixl (pip install .)")
        _low_latency_only(deepep_mode)
        self.group, self.num_experts, self.num_local_experts = group, num_experts, num_local_experts
        self.hidden_size, self.deepep_mode, self.return_recv_hook = hidden_size, deepep_mode, return_recv_hook
        self.num_max_dispatch_tokens_per_rank = _dispatch_tokens()
        self.quant_config, self.overlap_args = {}, None
        self.handle, self._mask = None, None

    def _buffer(self):
        return NixlEPBuffer.get_nixl_buffer(self.group, self.hidden_size, self.deepep_mode, self.num_max_dispatch_tokens_per_rank,
                                            self.num_experts, self.num_local_experts)

    def set_quant_config(self, quant_config):
        self.quant_config = dict(quant_config)

    def set_overlap_args(self, overlap_args):
        self.overlap_args = overlap_args

    def dispatch_a(self, hidden_states, topk_ids, topk_weights):
        buffer = self._buffer()
        NixlEPBuffer.take_up_resize()
        topk_ids = topk_ids.to(torch.int64)
        num_experts = buffer.group_size * self.num_local_experts
        expected_m = (hidden_states.shape[0] * buffer.group_size * topk_ids.shape[1] + num_experts) // num_experts
        ue8m0 = bool(self.quant_config.get("use_ue8m0", False))
        received, masked_m, self.handle, event, hook = buffer.dispatch(
            hidden_states, topk_ids, self.num_max_dispatch_tokens_per_rank, num_experts, use_fp8=not _dispatch_bf16(),
            async_finish=not self.return_recv_hook, return_recv_hook=self.return_recv_hook, round_scale=ue8m0 and not _dispatch_bf16(),
            use_ue8m0=ue8m0 and not _dispatch_bf16())
        return received, topk_ids, topk_weights, masked_m, expected_m, event, hook

    def dispatch_b(self, received, topk_ids, topk_weights, masked_m, expected_m, event, hook):
        self._wait(event, hook)
        data, scale = received if isinstance(received, tuple) else (received, None)
        return NixlEPDispatchOutput(data, scale, topk_ids, topk_weights, masked_m, expected_m)

    def combine_a(self, hidden_states, topk_ids, topk_weights):
        buffer = self._buffer()
        combined, event, hook = buffer.combine(x=hidden_states, topk_idx=topk_ids, topk_weights=topk_weights, handle=self.handle,
                                               async_finish=not self.return_recv_hook, return_recv_hook=self.return_recv_hook)
        return combined, event, hook

    def combine_b(self, combined, event, hook):
        self._wait(event, hook)
        self.handle = None
        state = ElasticEPStateManager.instance()
        if state is not None:
            if self._mask is None:
                self._mask = torch.empty(self._buffer().group_size, dtype=torch.int32, device=combined.device)
            refresh_active_ranks(self._buffer(), self._mask, state.active_ranks)
        return combined

    def _wait(self, event, hook):
        hook() if self.return_recv_hook else event.current_stream_wait()


class _Stage(enum.Enum):
    INITIAL = enum.auto()
    AFTER_DISPATCH_A = enum.auto()
    AFTER_DISPATCH_B = enum.auto()
    AFTER_COMBINE_A = enum.auto()


class NixlEPDispatcher:
    """One token dispatcher; two of them may be interleaved for two-batch overlap. AssertionError for a wrong order of calls."""

    def __init__(self, group, num_experts, num_local_experts, hidden_size, deepep_mode=DeepEPMode.LOW_LATENCY, return_recv_hook=True):
        self._impl = _NixlEPDispatcherImpl(group, num_experts, num_local_experts, hidden_size, deepep_mode, return_recv_hook)
        self._stage, self._between = _Stage.INITIAL, None

    def _advance(self, expected, then):
        assert self._stage is expected, f"the dispatcher is at stage {self._stage.name}; this call belongs to {expected.name}"
        self._stage = then

    def dispatch(self, hidden_states, topk_ids, topk_weights):
        """Both halves of a dispatch."""
        self.dispatch_a(hidden_states, topk_ids, topk_weights)
        return self.dispatch_b()

    def dispatch_a(self, hidden_states, topk_ids, topk_weights):
        """Sends the tokens [n, H] bfloat16 with ids and weights [n, K]."""
        self._advance(_Stage.INITIAL, _Stage.AFTER_DISPATCH_A)
        self._between = self._impl.dispatch_a(hidden_states, topk_ids, topk_weights)

    def dispatch_b(self):
        """Waits for what others sent: NixlEPDispatchOutput."""
        self._advance(_Stage.AFTER_DISPATCH_A, _Stage.AFTER_DISPATCH_B)
        between, self._between = self._between, None
        return self._impl.dispatch_b(*between)

    def combine(self, combine_input):
        """Both halves of a combine."""
        self.combine_a(combine_input)
        return self.combine_b()

    def combine_a(self, combine_input):
        """Sends the experts' rows home."""
        self._advance(_Stage.AFTER_DISPATCH_B, _Stage.AFTER_COMBINE_A)
        self._between = self._impl.combine_a(*combine_input)

    def combine_b(self):
        """Waits for the sums, bfloat16 [n, H], and notes who is alive."""
        self._advance(_Stage.AFTER_COMBINE_A, _Stage.INITIAL)
        between, self._between = self._between, None
        return self._impl.combine_b(*between)

    def set_quant_config(self, quant_config):
        """Settings of the payload: use_ue8m0."""
        self._impl.set_quant_config(quant_config)

    def set_overlap_args(self, overlap_args):
        """Kept for the engine's overlap."""
        self._impl.set_overlap_args(overlap_args)
