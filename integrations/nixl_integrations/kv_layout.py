"""Paged caches of keys and values: what one rank holds, and how the part that two ranks share is cut into units."""

import math

import numpy

from nixl_integrations.memory_view import MemoryView


class KVCache:
    """The layers of one rank. `tp_rank` of `tp_size`: which share of all heads they hold."""

    def __init__(self, layers, tp_rank=0, tp_size=1):
        self.layers = [MemoryView(layer) for layer in layers]
        shapes = {view.shape for view in self.layers}
        if len(shapes) != 1 or len(next(iter(shapes))) != 5 or next(iter(shapes))[0] != 2:
            raise ValueError(f"layers of one shape [2, blocks, heads, page, dim] are needed, not {sorted(shapes)}")
        _, self.num_blocks, self.num_heads, self.page, self.dim = self.layers[0].shape
        if not 0 <= tp_rank < tp_size:
            raise ValueError(f"tp_rank is {tp_rank}; 0 to {tp_size - 1} are allowed with tp_size {tp_size}")
        self.tp_rank, self.tp_size = tp_rank, tp_size
        self.token_bytes = self.dim * self.layers[0].itemsize  # of one head
        self.block_bytes = self.num_heads * self.page * self.token_bytes
        self.kind, self.device = self.layers[0].kind, self.layers[0].device

    def describe(self):
        """What a peer needs to know, as plain values for JSON."""
        return {"bases": [view.address for view in self.layers], "blocks": self.num_blocks, "heads": self.num_heads,
                "page": self.page, "token_bytes": self.token_bytes, "kind": self.kind, "device": self.device,
                "tp_rank": self.tp_rank, "tp_size": self.tp_size}

    def num_pages(self, num_tokens):
        """Blocks that so many tokens fill."""
        return -(-num_tokens // self.page)


class Side:
    """What one side of a pair of caches looks like, from KVCache.describe() of ours or of a peer's."""

    def __init__(self, about):
        self.bases, self.blocks, self.heads, self.page = about["bases"], about["blocks"], about["heads"], about["page"]
        self.token_bytes, self.kind, self.device = about["token_bytes"], about["kind"], about["device"]
        self.first_head = about["tp_rank"] * self.heads
        self.all_heads = about["tp_size"] * self.heads
        self.block_bytes = self.heads * self.page * self.token_bytes

    def block_numbers(self, block_ids):
        """The numbers as int64 [n]; ValueError when one of them is no block of this cache."""
        numbers = numpy.asarray(block_ids)
        if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
            raise ValueError(f"a list of block numbers is needed, not {numbers.dtype} of shape {numbers.shape}")
        for wrong in numbers[(numbers < 0) | (numbers >= self.blocks)][:1]:
            raise ValueError(f"block {wrong} is not in the cache, which has blocks 0 to {self.blocks - 1}")
        return numpy.ascontiguousarray(numbers, dtype=numpy.int64)

    def head_range(self):
        return range(self.first_head, self.first_head + self.heads)

    def rows(self, units):
        """The strided table (address, length, device, stride, count) of the units; block index = row * blocks + block."""
        rows = []
        for base in self.bases:
            for plane in range(2):
                start = base + plane * self.blocks * self.block_bytes
                for head, count in units.heads:
                    for piece in range(self.page // units.tokens):
                        offset = ((head - self.first_head) * self.page + piece * units.tokens) * self.token_bytes
                        length = count * units.tokens * self.token_bytes
                        rows.append((start + offset, length, self.device, self.block_bytes, self.blocks))
        return numpy.array(rows, dtype=numpy.uint64)

    def indices(self, units, block_ids, first_unit, num_units):
        """Indices into rows() of token units `first_unit`.. of a request in `block_ids`, for all planes and heads."""
        pieces = self.page // units.tokens
        needed = -(-(first_unit + num_units) // pieces)
        if needed > len(block_ids):
            raise ValueError(f"{needed} blocks of {self.page} tokens are needed, {len(block_ids)} given")
        unit = numpy.arange(first_unit, first_unit + num_units, dtype=numpy.int64)
        within = (unit % pieces) * self.blocks + block_ids[unit // pieces]
        planes = 2 * len(self.bases) * len(units.heads)
        return (numpy.arange(planes, dtype=numpy.int64)[:, None] * (pieces * self.blocks) + within[None, :]).reshape(-1)


class Units:
    """How the shared part of two caches is cut: `heads` = [(first head, how many)], `tokens` of a page at a time."""

    def __init__(self, ours, theirs):
        for name in ("token_bytes", "all_heads"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(f"the caches differ in {name}: {getattr(ours, name)} here, {getattr(theirs, name)} there")
        if len(ours.bases) != len(theirs.bases):
            raise ValueError(f"the caches differ in layers: {len(ours.bases)} here, {len(theirs.bases)} there")
        shared = sorted(set(ours.head_range()) & set(theirs.head_range()))
        if ours.page == theirs.page:  # neighbouring heads of a page lie side by side
            self.heads, self.tokens = ([(shared[0], len(shared))] if shared else []), ours.page
        else:
            self.heads, self.tokens = [(head, 1) for head in shared], math.gcd(ours.page, theirs.page)

    def shared_heads(self):
        """Numbers of the heads that both sides hold."""
        return {head for first, count in self.heads for head in range(first, first + count)}
