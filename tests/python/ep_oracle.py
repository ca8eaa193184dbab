"""Numpy reference of expert-parallel dispatch and combine, for a whole group of ranks at once.

It takes what every rank passes in and gives what every rank must get, to the bit. It is written from the
documented behaviour and shares no code with the product: plain arrays, no slots, no flags, no processes.

Tensors of bfloat16 and float8 are their bit patterns here (`uint16`, `uint8`). All sums and products are float32,
rounded after each step. Where a NaN comes out, its bits carry no meaning: compare through `canonical_*`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

GROUP = 128  # channels that share one scale
E4M3_MAX = np.float32(448)
SMALLEST_AMAX = np.float32(1e-4)


class Payload(enum.Enum):
    """What dispatch sends: the rows as they are, or FP8 with one of three kinds of scale."""

    BF16 = "bf16"
    FP8 = "fp8"
    FP8_ROUND = "fp8+round_scale"
    FP8_UE8M0 = "fp8+ue8m0"


@dataclass(frozen=True)
class Layout:
    """Bounds of one operation: `ranks` is the rank bound of the call, `max_tokens` the bound on tokens a rank."""

    ranks: int
    experts_per_rank: int
    max_tokens: int
    hidden: int

    @property
    def rows(self) -> int:
        return self.ranks * self.max_tokens

    @property
    def experts(self) -> int:
        return self.ranks * self.experts_per_rank


@dataclass(frozen=True)
class Tokens:
    """One rank's input: x uint16 bits [n, H], topk_idx int64 [n, K], topk_weights float32 [n, K]."""

    x: np.ndarray
    topk_idx: np.ndarray
    topk_weights: np.ndarray


@dataclass(frozen=True)
class Received:
    """One rank's output of dispatch; the lists have one entry a local expert, holding its valid rows only."""

    x: list[np.ndarray]  # uint16 or uint8 [count, H]
    scales: list[np.ndarray] | None  # float32 [count, H/128], or int32 [count, H/512]
    source: list[np.ndarray]  # int64 [count]: rank a row came from
    src_info: list[np.ndarray]  # int32 [count]: its token index there
    slot: list[np.ndarray]  # int64 [count]: its place in the token's top-k
    layout_range: np.ndarray  # int64 [L, R]: first row << 32 | number of rows
    count: np.ndarray  # int32 [L]


# ---------------------------------------------------------------------------------------------------------------- bits


def bf16_from_float(values) -> np.ndarray:
    """float32 -> bfloat16 bits, ties to even; NaN becomes 0x7fc0 with its sign."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = ((bits >> 16) & 0x8000) | 0x7FC0
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def float_from_bf16(bits) -> np.ndarray:
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def e4m3_from_float(values) -> np.ndarray:
    """float32 -> E4M3 bits, ties to even; everything beyond 448, infinities too, becomes 448; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32)
    sign = (np.signbit(values).astype(np.uint8)) << 7
    size = np.minimum(np.abs(np.where(np.isnan(values), 0, values)), E4M3_MAX).astype(np.float64)
    _, exponent = np.frexp(size)  # size = m * 2^exponent with 0.5 <= m < 1
    exponent = np.where(size == 0, -6, np.maximum(exponent - 1, -6))
    steps = np.rint(np.ldexp(size, 3 - exponent)).astype(np.int64)  # exact before rint; 8..16, below 8 subnormal
    code = steps + ((exponent + 6) << 3)  # a carry into 16 steps is the next binade by itself
    return np.where(np.isnan(values), 0x7F, code).astype(np.uint8) | sign


def float_from_e4m3(bits) -> np.ndarray:
    bits = np.asarray(bits, dtype=np.uint8)
    exponent = ((bits >> 3) & 15).astype(np.int64)
    mantissa = (bits & 7).astype(np.float64)
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    size = np.where((bits & 0x7F) == 0x7F, np.nan, size)
    return np.where(bits & 0x80, -size, size).astype(np.float32)


def canonical_bf16(bits) -> np.ndarray:
    """The same bits with every NaN as 0x7fc0, so that equality means what it should."""
    bits = np.asarray(bits, dtype=np.uint16)
    return np.where((bits & 0x7FFF) > 0x7F80, np.uint16(0x7FC0), bits)


def canonical_e4m3(bits) -> np.ndarray:
    bits = np.asarray(bits, dtype=np.uint8)
    return np.where((bits & 0x7F) == 0x7F, np.uint8(0x7F), bits)


# -------------------------------------------------------------------------------------------------------- quantisation


def quantize(x, payload: Payload) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows of bfloat16 bits [n, H] -> (payload [n, H], scales [n, H/128], packed [n, H/512] for ue8m0, or None)."""
    x = np.asarray(x, dtype=np.uint16)
    if payload is Payload.BF16:
        return x, None
    count, hidden = x.shape
    groups = float_from_bf16(x).reshape(count, hidden // GROUP, GROUP)
    with np.errstate(all="ignore"):
        amax = np.fmax.reduce(np.abs(groups), axis=2, initial=SMALLEST_AMAX)  # fmax passes over NaN
        if payload is Payload.FP8:
            scales = amax * (np.float32(1) / E4M3_MAX)
            factor = E4M3_MAX / amax
        else:
            exponent = _exponent_at_least(amax / E4M3_MAX)
            scales = np.ldexp(np.float32(1), exponent)
            factor = np.ldexp(np.float32(1), -exponent)
        assert scales.dtype == factor.dtype == np.float32
        values = e4m3_from_float(groups * factor[:, :, None]).reshape(count, hidden)
    if payload is Payload.FP8_UE8M0:
        biased = np.ascontiguousarray((exponent + 127).astype(np.uint8))
        return values, biased.view("<i4").astype(np.int32)
    return values, scales


def dequantize(values, scales, payload: Payload) -> np.ndarray:
    """Payload rows back to float32 [n, H]."""
    if payload is Payload.BF16:
        return float_from_bf16(values)
    if payload is Payload.FP8_UE8M0:
        biased = np.ascontiguousarray(scales, dtype="<i4").view(np.uint8).astype(np.int64)
        scales = np.ldexp(1.0, biased - 127)
    count, hidden = values.shape
    grouped = float_from_e4m3(values).reshape(count, hidden // GROUP, GROUP)
    with np.errstate(all="ignore"):
        return (grouped * np.asarray(scales, np.float32)[:, :, None]).reshape(count, hidden)


def _exponent_at_least(ratio) -> np.ndarray:
    """Smallest e with 2^e >= ratio, from the bits of a positive normal float32; infinity counts as 2^128."""
    bits = np.ascontiguousarray(ratio, dtype=np.float32).view(np.uint32)
    return (bits >> 23).astype(np.int64) - 127 + ((bits & 0x7FFFFF) != 0)


# ------------------------------------------------------------------------------------------------- dispatch and combine


def all_links(ranks: int, present: Sequence[int]) -> np.ndarray:
    """bool [R, R], [to, from]: who takes data from whom when every rank of `present` serves every other."""
    links = np.zeros((ranks, ranks), dtype=bool)
    links[np.ix_(list(present), list(present))] = True
    return links


def dispatch(
    layout: Layout, tokens: Mapping[int, Tokens], payload: Payload, links: np.ndarray | None = None
) -> dict[int, Received]:
    """What each rank of `tokens` receives. Ids outside [0, R*L) and ids of ranks that are not linked are skipped.

    Rows of an expert come by ascending source, token, place in the top-k. A source's rows for one expert beyond
    `max_tokens` are dropped, the last ones.
    """
    if links is None:
        links = all_links(layout.ranks, sorted(tokens))
    sources = sorted(tokens)
    quantized = {rank: quantize(tokens[rank].x, payload) for rank in sources}
    return {rank: _receive(layout, tokens, quantized, payload, rank, links[rank]) for rank in sources}


def _receive(layout, tokens, quantized, payload, rank, takes_from) -> Received:
    experts = range(layout.experts_per_rank)
    out = Received(
        x=[],
        scales=None if payload is Payload.BF16 else [],
        source=[],
        src_info=[],
        slot=[],
        layout_range=np.zeros((len(experts), layout.ranks), np.int64),
        count=np.zeros(len(experts), np.int32),
    )
    sources = [source for source in sorted(tokens) if takes_from[source]]
    for local in experts:
        wanted = rank * layout.experts_per_rank + local
        blocks = []  # (source, token indices, places in the top-k)
        first = 0
        for source in sources:
            token, slot = (found[: layout.max_tokens] for found in np.nonzero(tokens[source].topk_idx == wanted))
            out.layout_range[local, source] = (first << 32) | len(token)
            first += len(token)
            blocks.append((source, token, slot))
        out.count[local] = first
        out.x.append(_gather([quantized[source][0][token] for source, token, _ in blocks], quantized, 0))
        if out.scales is not None:
            out.scales.append(_gather([quantized[source][1][token] for source, token, _ in blocks], quantized, 1))
        out.source.append(_join([np.full(len(token), source) for source, token, _ in blocks], np.int64))
        out.src_info.append(_join([token for _, token, _ in blocks], np.int32))
        out.slot.append(_join([slot for _, _, slot in blocks], np.int64))
    return out


def _gather(blocks, quantized, part):
    """The blocks under one another; with no block at all an empty one of the right width."""
    return np.concatenate(blocks) if blocks else next(iter(quantized.values()))[part][:0]


def _join(blocks, dtype):
    return np.concatenate(blocks).astype(dtype) if blocks else np.zeros(0, dtype)


def combine(
    layout: Layout,
    tokens: Mapping[int, Tokens],
    received: Mapping[int, Received],
    y: Mapping[int, Sequence[np.ndarray]],
    mode: str = "exact",
    links: np.ndarray | None = None,
) -> dict[int, np.ndarray]:
    """What each rank gets back, uint16 bits [n, H], when rank r's expert e made `y[r][e]` (uint16 [count, H]).

    "exact": row i is the sum over k of weight * y in float32, in order of k, rounded once. "reduced": the sum over
    the k held by one rank is rounded to bfloat16, and these are added in order of rank. Rows of owners that are not
    linked (`links[owner of token, holder of expert]`) count nothing; what is left of nothing is zero.
    """
    assert mode in ("exact", "reduced"), mode
    if links is None:
        links = all_links(layout.ranks, sorted(tokens))
    out = {}
    with np.errstate(all="ignore"):
        for rank, mine in tokens.items():
            holders = [holder for holder in sorted(received) if links[rank, holder]]
            terms = [_terms(layout, mine, rank, holder, received[holder], y[holder]) for holder in holders]
            out[rank] = bf16_from_float(_sum_exact(terms, mine.x) if mode == "exact" else _sum_reduced(terms, mine.x))
    return out


def _terms(layout, mine, rank, holder, received, y):
    """By place in the top-k: (token indices, weighted rows) of this rank's tokens that `holder` computed."""
    terms = {}
    for slot in range(mine.topk_idx.shape[1]):
        indices, rows = [], []
        for local in range(layout.experts_per_rank):
            chosen = (received.source[local] == rank) & (received.slot[local] == slot)
            indices.append(received.src_info[local][chosen])
            rows.append(float_from_bf16(y[local][chosen]))
        index = np.concatenate(indices)
        terms[slot] = index, mine.topk_weights[index, slot].astype(np.float32)[:, None] * np.concatenate(rows)
    return terms


def _sum_exact(terms, x) -> np.ndarray:
    total = np.zeros(x.shape, np.float32)
    for slot in sorted({slot for holder in terms for slot in holder}):
        for holder in terms:  # a token has one holder for a slot, so the order of holders does not matter here
            index, rows = holder[slot]
            total[index] += rows
    return total


def _sum_reduced(terms, x) -> np.ndarray:
    total = np.zeros(x.shape, np.float32)
    for holder in terms:
        partial = np.zeros(x.shape, np.float32)
        for slot in sorted(holder):
            index, rows = holder[slot]
            partial[index] += rows
        total += float_from_bf16(bf16_from_float(partial))
    return total


# --------------------------------------------------------------------------------------------------------- small things


def size_hint_bound(max_tokens: int, hidden: int, experts: int) -> int:
    """Bytes of the classic formula, which always suffice."""
    dispatch_row = 16 + max(2 * hidden, hidden + 4 * (hidden // GROUP))
    combine_row = 4 * (hidden // GROUP) + 2 * hidden
    send = max(max_tokens * dispatch_row, experts * max_tokens * combine_row)
    receive = experts * max_tokens * max(dispatch_row, combine_row)
    signals = -(-8 * experts // 128) * 128
    return (2 * (send + receive + signals) // 128 + 1) * 128


def dispatch_layout(topk_idx, experts: int, ranks: int):
    """(tokens a rank, tokens a node of 8 ranks or None, tokens an expert, bool [n, ranks]) for one rank's ids."""
    topk_idx = np.asarray(topk_idx)
    per_expert = np.array([(topk_idx == expert).sum() for expert in range(experts)], np.int32)
    owner = np.where(topk_idx >= 0, topk_idx // (experts // ranks), -1)
    in_rank = np.stack([(owner == rank).any(axis=1) for rank in range(ranks)], axis=1)
    per_node = None
    if ranks > 8:
        per_node = np.array([in_rank[:, n : n + 8].any(axis=1).sum() for n in range(0, ranks, 8)], np.int32)
    return in_rank.sum(axis=0).astype(np.int32), per_node, per_expert, in_rank


def calc_diff(a, b) -> float:
    """Distance used by the elastic checks: 0 for equal arrays, about the squared relative error for close ones."""
    a, b = np.asarray(a, np.float64) + 1, np.asarray(b, np.float64) + 1
    return float(1 - 2 * (a * b).sum() / (a * a + b * b).sum())
