"""Inputs of a whole group from one seed, one checked operation on a rank, and the comparison with the oracle.

Everything here runs inside rank processes: every rank makes all ranks' inputs by itself and compares what it got
with what the oracle says it must get, so nothing but verdicts travels back to the test.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import ep_oracle as oracle
import numpy as np
from ep_oracle import Layout, Payload, Tokens

STYLES = ("plain", "hook", "async")


@dataclass(frozen=True)
class Shape:
    """A group's buffer and the bounds of its operations. `capacity` is the number of rank ids, default `ranks`."""

    ranks: int = 4
    experts_per_rank: int = 2
    max_tokens: int = 8
    hidden: int = 512
    topk: int = 4
    capacity: int | None = None

    def layout(self, ranks: int | None = None) -> Layout:
        return Layout(ranks or self.ranks, self.experts_per_rank, self.max_tokens, self.hidden)


@dataclass(frozen=True)
class Options:
    """How one dispatch and combine are called."""

    payload: Payload = Payload.BF16
    style: str = "plain"
    index: str = "int64"
    zero_copy: bool = False
    out: bool = False
    combine: str = "exact"  # the buffer's setting
    weights_at_dispatch: bool = False

    @property
    def combine_mode(self) -> str:
        """A hook's send phase holds no weights unless dispatch brought them, so the sum is exact there."""
        return "exact" if self.style == "hook" and not self.weights_at_dispatch else self.combine


# --------------------------------------------------------------------------------------------------------------- inputs


def make_tokens(shape: Shape, seed: int, rank: int, kind: str = "mixed", ranks: int | None = None) -> Tokens:
    """One rank's tokens. Kinds: "mixed" (skipped and repeated ids, uneven numbers of tokens, odd values), "plain"
    (every token present, every id legal and distinct), "empty", "hot" (all to expert 0)."""
    rng = np.random.default_rng([seed, rank])
    experts = (ranks or shape.ranks) * shape.experts_per_rank
    n = {"plain": shape.max_tokens, "hot": shape.max_tokens, "empty": 0}.get(kind)
    if n is None:
        n = int(rng.integers(0, shape.max_tokens + 1)) if rng.random() < 0.8 else shape.max_tokens
    if kind == "hot":
        ids = np.where(np.arange(shape.topk) == 0, 0, -1) * np.ones((n, 1), np.int64)
    else:
        ids = _distinct_ids(rng, n, shape.topk, experts)
    values = rng.standard_normal((n, shape.hidden), np.float32)
    if kind == "mixed":
        ids = _mixed_ids(rng, ids, experts, shape.max_tokens)
        values = _mixed_values(rng, values)
    weights = rng.random((n, shape.topk), np.float32) + np.float32(0.05)
    return Tokens(oracle.bf16_from_float(values), ids.astype(np.int64), weights)


def _distinct_ids(rng, n, topk, experts) -> np.ndarray:
    """Distinct ids in a row as far as there are enough experts, then -1."""
    order = np.argsort(rng.random((n, experts)), axis=1)[:, :topk]
    return np.pad(order, ((0, 0), (0, topk - order.shape[1])), constant_values=-1)


def _mixed_ids(rng, ids, experts, max_copies) -> np.ndarray:
    chance = rng.random(ids.shape)
    ids = np.where(chance < 0.1, -1, ids)
    ids = np.where((chance > 0.1) & (chance < 0.15), rng.integers(-(2**31), 0, ids.shape), ids)
    repeat = (chance > 0.8) & (np.arange(ids.shape[1]) > 0)
    ids = np.where(repeat, np.roll(ids, 1, axis=1), ids)
    return cap_copies(ids, max_copies)


def cap_copies(ids, most: int) -> np.ndarray:
    """Replaces selections of one expert beyond `most`, the bound a rank must keep, by -1."""
    ids = np.array(ids)
    flat = ids.reshape(-1)
    for expert in np.unique(flat[flat >= 0]):
        flat[np.flatnonzero(flat == expert)[most:]] = -1
    return ids


def _mixed_values(rng, values) -> np.ndarray:
    """Rows of very different sizes; some zero, some with NaN and infinity in places."""
    n, hidden = values.shape
    sizes = rng.choice([1e-30, 1e-4, 0.1, 1, 1, 1, 300, 1e30], (n, 1)).astype(np.float32)
    values = values * sizes
    values[rng.random(n) < 0.1] = 0
    for odd in (np.nan, np.inf, -np.inf):
        rows = np.flatnonzero(rng.random(n) < 0.08)
        values[rows, rng.integers(0, hidden, len(rows))] = odd
    return values


def make_outputs(received: Sequence[np.ndarray], hidden: int, seed: int, rank: int, odd: bool = True) -> list:
    """What a rank's experts compute, for as many rows as each received: uint16 [count, H] an expert."""
    rng = np.random.default_rng([seed, rank, 77])
    made = []
    for rows in received:
        values = rng.standard_normal((len(rows), hidden), np.float32) * 4
        if odd:
            values[rng.random(values.shape) < 1e-3] = np.nan
            values[rng.random(values.shape) < 1e-3] = np.inf
        made.append(oracle.bf16_from_float(values))
    return made


@dataclass(frozen=True)
class Operation:
    """One operation of a group: all inputs, and all that must come out."""

    layout: Layout
    tokens: dict
    received: dict
    y: dict
    combined: dict


def expected_operation(layout, tokens, payload, mode, seed, links=None, combine_links=None) -> Operation:
    """`links` (see the oracle) say who reached whom in dispatch, `combine_links` in combine (default: the same)."""
    received = oracle.dispatch(layout, tokens, payload, links)
    y = {rank: make_outputs(r.src_info, layout.hidden, seed, rank) for rank, r in received.items()}
    combined = oracle.combine(layout, tokens, received, y, mode, links if combine_links is None else combine_links)
    return Operation(layout, tokens, received, y, combined)


@functools.lru_cache(maxsize=64)
def group_operation(shape: Shape, payload: Payload, mode: str, seed: int, kind: str = "mixed", present=None, ranks=None):
    """The operation in which all of `present` (default: everyone) take part; cached, so do not write into it."""
    present = range(shape.ranks) if present is None else present
    tokens = {rank: make_tokens(shape, seed, rank, kind, ranks) for rank in present}
    return expected_operation(shape.layout(ranks), tokens, payload, mode, seed)


# -------------------------------------------------------------------------------------------------------------- tensors


def tensor_bf16(bits, device):
    import torch

    return torch.from_numpy(np.ascontiguousarray(bits).view(np.int16)).view(torch.bfloat16).to(device)


def bits_of(tensor) -> np.ndarray:
    """bfloat16 -> uint16 bits, float8 -> uint8 bits, anything else as numpy gives it."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.contiguous().view(torch.uint8).numpy()
    return tensor.numpy()


def expert_rows(layout: Layout, y: Sequence[np.ndarray], device):
    """The tensor combine takes: [L, T, H] bfloat16, y in its first rows, NaN after them."""
    full = np.full((layout.experts_per_rank, layout.rows, layout.hidden), 0x7FC0, np.uint16)
    for expert, rows in enumerate(y):
        full[expert, : len(rows)] = rows
    return tensor_bf16(full, device)


def open_buffer(rank, shape: Shape, combine="exact", timeout_ms=10_000, connect=None, store=None, **keywords):
    """A buffer with memory for `shape`, connected to the ranks of `connect` (default: all of the shape's)."""
    import nixl_ep

    capacity = shape.capacity or shape.ranks
    buffer = nixl_ep.Buffer(
        rank=rank.rank,
        explicitly_destroy=True,
        tcp_store_group=store or rank.store(),
        timeout_ms=timeout_ms,
        device=rank.device,
        combine=combine,
        **keywords,
    )
    buffer.update_memory_buffers(capacity, shape.experts_per_rank, memory_bytes(shape))
    connect = range(shape.ranks) if connect is None else connect
    if list(connect):
        buffer.connect_ranks(list(connect))
    return buffer


def memory_bytes(shape: Shape) -> int:
    import nixl_ep

    capacity = shape.capacity or shape.ranks
    return nixl_ep.Buffer.get_rdma_size_hint(
        shape.max_tokens, shape.hidden, capacity, capacity * shape.experts_per_rank
    )


# ------------------------------------------------------------------------------------------------------ one operation


def finish(style: str, event, hook) -> list[str]:
    """Makes outputs defined the way `style` says; returns what is wrong with event and hook themselves."""
    problems = []
    if (hook is not None) != (style == "hook"):
        problems.append(f"hook is {hook!r} in style {style}")
    if (event.event is not None) != (style == "async"):
        problems.append(f"event.event is {event.event!r} in style {style}")
    if style == "hook" and hook is not None:
        hook()
    if style == "async" and event.event is not None:
        event.current_stream_wait()
    return problems


def dispatch_arguments(payload: Payload) -> dict:
    return {
        "use_fp8": payload is not Payload.BF16,
        "round_scale": payload in (Payload.FP8_ROUND, Payload.FP8_UE8M0),
        "use_ue8m0": payload is Payload.FP8_UE8M0,
    }


def style_arguments(style: str) -> dict:
    return {"async_finish": style == "async", "return_recv_hook": style == "hook"}


def run_dispatch(buffer, tokens: Tokens, layout: Layout, options: Options, device="cpu", **keywords):
    """Returns (recv_x, recv_count, handle, problems), outputs defined."""
    import torch

    ids = torch.from_numpy(tokens.topk_idx).to(getattr(torch, options.index)).to(device)
    if options.weights_at_dispatch:
        keywords["topk_weights"] = torch.from_numpy(tokens.topk_weights).to(device)
    recv_x, count, handle, event, hook = buffer.dispatch(
        tensor_bf16(tokens.x, device),
        ids,
        layout.max_tokens,
        layout.experts,
        **dispatch_arguments(options.payload),
        **style_arguments(options.style),
        **keywords,
    )
    return recv_x, count, handle, finish(options.style, event, hook)


def run_combine(buffer, tokens: Tokens, layout: Layout, y, handle, options: Options, device="cpu", **keywords):
    """Returns (combined bits [n, H], problems)."""
    import torch

    x = expert_rows(layout, y, device)
    if options.zero_copy:
        view = buffer.get_next_combine_buffer(handle)
        if tuple(view.shape) != tuple(x.shape) or view.dtype != torch.bfloat16 or view.stride(2) != 1:
            return None, [f"zero-copy view {tuple(view.shape)} {view.dtype} strides {view.stride()}"]
        view.copy_(x)
        keywords["zero_copy"] = True
    if options.out:
        keywords["out"] = torch.full(tokens.x.shape, float("nan"), dtype=torch.bfloat16, device=device)
    combined, event, hook = buffer.combine(
        x,
        torch.from_numpy(tokens.topk_idx).to(getattr(torch, options.index)).to(device),
        torch.from_numpy(tokens.topk_weights).to(device),
        handle,
        **style_arguments(options.style),
        **keywords,
    )
    problems = finish(options.style, event, hook)
    if options.out and combined.data_ptr() != keywords["out"].data_ptr():
        problems.append("the returned tensor is not out=")
    if tuple(combined.shape) != tokens.x.shape or combined.dtype != torch.bfloat16 or not combined.is_contiguous():
        problems.append(f"combined is {tuple(combined.shape)} {combined.dtype} strides {combined.stride()}")
    return bits_of(combined), problems


def run_operation(buffer, rank, operation: Operation, options: Options) -> list[str]:
    """One dispatch and its combine on a rank (of ep_ranks), every output compared; returns what differs."""
    me, layout = rank.rank, operation.layout
    recv_x, count, handle, problems = run_dispatch(buffer, operation.tokens[me], layout, options, rank.device)
    problems += compare_dispatch(layout, options.payload, operation.received[me], recv_x, count, handle)
    got, more = run_combine(buffer, operation.tokens[me], layout, operation.y[me], handle, options, rank.device)
    problems += more
    if got is not None:
        problems += compare_rows("combined", operation.combined[me], got)
    return [f"rank {me}, {options}: {problem}" for problem in problems]


# ----------------------------------------------------------------------------------------------------------- comparison


def compare_dispatch(layout: Layout, payload: Payload, want: oracle.Received, recv_x, count, handle) -> list[str]:
    """Shapes, dtypes, strides and every valid value of one rank's dispatch outputs."""
    problems = compare_forms(layout, payload, recv_x, count, handle)
    if problems:
        return problems
    src_info, layout_range, *_ = handle
    scales = None
    if payload is not Payload.BF16:
        recv_x, scales = recv_x
    problems += compare_rows("recv_count", want.count, bits_of(count))
    ranges = bits_of(layout_range)
    mask = np.int64(0xFFFFFFFF)
    problems += compare_rows("rows by source", want.layout_range & mask, ranges & mask)
    filled = (want.layout_range & mask) > 0
    problems += compare_rows("layout_range", want.layout_range[filled], ranges[filled])
    if problems:
        return problems
    for expert, n in enumerate(want.count):
        problems += compare_rows(f"expert {expert} src_info", want.src_info[expert], bits_of(src_info[expert, :n]))
        problems += compare_rows(f"expert {expert} rows", want.x[expert], bits_of(recv_x[expert, :n]))
        if scales is not None:
            problems += compare_rows(f"expert {expert} scales", want.scales[expert], bits_of(scales[expert, :n]))
    return problems


def compare_forms(layout: Layout, payload: Payload, recv_x, count, handle) -> list[str]:
    import torch

    experts, rows, hidden = layout.experts_per_rank, layout.rows, layout.hidden
    forms = []
    if payload is Payload.BF16:
        forms.append(("recv_x", recv_x, torch.bfloat16, (experts, rows, hidden), None))
    else:
        if not isinstance(recv_x, tuple) or len(recv_x) != 2:
            return [f"recv_x is {type(recv_x).__name__}, not a pair of values and scales"]
        groups, dtype = hidden // 128, torch.float32
        if payload is Payload.FP8_UE8M0:
            groups, dtype = hidden // 512, torch.int32
        forms.append(("recv_x", recv_x[0], torch.float8_e4m3fn, (experts, rows, hidden), None))
        forms.append(("scales", recv_x[1], dtype, (experts, rows, groups), (groups * rows, 1, rows)))
    forms.append(("recv_count", count, torch.int32, (experts,), None))
    if not isinstance(handle, tuple) or len(handle) != 4 or handle[2:] != (layout.max_tokens, hidden):
        return [f"handle is {handle!r}"]
    forms.append(("src_info", handle[0], torch.int32, (experts, rows), None))
    forms.append(("layout_range", handle[1], torch.int64, (experts, layout.ranks), None))
    problems = []
    for name, tensor, dtype, shape, strides in forms:
        strides = strides or torch.empty(shape, device="meta").stride()
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or tuple(tensor.stride()) != tuple(strides):
            seen = f"{tensor.dtype} {tuple(tensor.shape)} strides {tuple(tensor.stride())}"
            problems.append(f"{name} is {seen}, must be {dtype} {shape} strides {tuple(strides)}")
    return problems


def compare_rows(name: str, want: np.ndarray, got: np.ndarray) -> list[str]:
    """Bit for bit; NaNs of 8 and 16 bit patterns count as equal."""
    if want.dtype == np.uint16:
        want, got = oracle.canonical_bf16(want), oracle.canonical_bf16(got)
    elif want.dtype == np.uint8:
        want, got = oracle.canonical_e4m3(want), oracle.canonical_e4m3(got)
    if want.shape != got.shape:
        return [f"{name}: shape {got.shape}, must be {want.shape}"]
    differs = ~((want == got) | ((want != want) & (got != got)))
    if not differs.any():
        return []
    where = tuple(int(i) for i in np.argwhere(differs)[0])
    return [f"{name}: {differs.sum()} of {want.size} differ, first at {where}: {got[where]}, must be {want[where]}"]


def run_operations(buffer, rank, present, count, first=0, ranks=4, shape: Shape = Shape(), combine="exact"):
    """`count` checked operations of the ranks `present`, in a layout of `ranks`, of every payload in turn."""
    problems = []
    for seed in range(first, first + count):
        payload = list(Payload)[seed % 4]
        operation = group_operation(shape, payload, combine, seed, present=tuple(present), ranks=ranks)
        problems += run_operation(buffer, rank, operation, Options(payload, combine=combine))
    return problems


def no_problems(results):
    """Fails with what the ranks of a call complain of."""
    problems = [problem for result in results.values() for problem in result]
    assert not problems, "\n".join(problems[:20])
