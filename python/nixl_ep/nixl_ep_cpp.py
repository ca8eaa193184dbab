"""The names of the compiled module that programs may look for."""
from ._native import Buffer
from .config import Config
from .layout import size_hint
from .utils import EventHandle

__all__ = ["Buffer", "Config", "EventHandle", "get_low_latency_buffer_size_hint", "is_sm90_compiled", "topk_idx_t"]


def is_sm90_compiled() -> bool:
    """Whether this build holds kernels (they are compiled for sm_90 and up)."""
    from ._native import cuda_unavailable_reason

    return "without CUDA kernels" not in cuda_unavailable_reason()


def get_low_latency_buffer_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int,
                                     num_experts: int) -> int:
    """See :meth:`nixl_ep.Buffer.get_low_latency_buffer_size_hint`."""
    return size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)


def __getattr__(name):
    if name == "topk_idx_t":
        import torch

        return torch.int32
    raise AttributeError(f"module 'nixl_ep.nixl_ep_cpp' has no attribute '{name}'")
