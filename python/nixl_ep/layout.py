"""Sizes: the bytes of a buffer, and the counts of get_dispatch_layout as vectorised tensor operations on any device."""
from typing import Any, Optional, Tuple

from . import _native
from .errors import integer, native_call

RANKS_PER_NODE = 8


def size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes; see :meth:`nixl_ep.Buffer.get_low_latency_buffer_size_hint`."""
    return native_call(_native.size_hint, integer("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 64),
                       integer("hidden", hidden, 64), integer("num_ranks", num_ranks), integer("num_experts", num_experts))


def dispatch_layout(torch: Any, topk_idx: Any, num_experts: int, num_ranks: int) -> Tuple[Any, Optional[Any], Any, Any]:
    """topk_idx int [n, K] -> tokens per rank int32 [num_ranks], per node int32 or None, per expert int32 [num_experts],
    is_token_in_rank bool [n, num_ranks]."""
    n, device = topk_idx.shape[0], topk_idx.device
    ids = topk_idx.long()
    valid = (ids >= 0) & (ids < num_experts)
    # One place more than there are experts takes the ids that do not count.
    per_expert = torch.zeros((num_experts + 1,), dtype=torch.int32, device=device)
    per_expert.index_add_(0, torch.where(valid, ids, num_experts).flatten(),
                          torch.ones((ids.numel(),), dtype=torch.int32, device=device))
    in_rank = torch.zeros((n, num_ranks + 1), dtype=torch.bool, device=device)
    in_rank.scatter_(1, torch.where(valid, ids // (num_experts // num_ranks), num_ranks), True)
    in_rank = in_rank[:, :num_ranks].contiguous()
    per_node = None
    if num_ranks > RANKS_PER_NODE:
        nodes = -(-num_ranks // RANKS_PER_NODE)
        padded = torch.zeros((n, nodes * RANKS_PER_NODE), dtype=torch.bool, device=device)
        padded[:, :num_ranks] = in_rank
        per_node = padded.view(n, nodes, RANKS_PER_NODE).any(dim=2).sum(dim=0, dtype=torch.int32)
    return in_rank.sum(dim=0, dtype=torch.int32), per_node, per_expert[:num_experts].contiguous(), in_rank
