"""Serving under faults: what every rank runs while a test kills or stops one of them, and how its outputs are judged.

A rank judges each operation by its own faults: peers named by then give nothing, all others everything, for all local
experts. So a rank that is half delivered, a fault told late, or a healthy rank masked is a difference to the oracle.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field

import ep_oracle as oracle
from ep_cases import (
    Options,
    Shape,
    bits_of,
    compare_dispatch,
    compare_rows,
    make_outputs,
    make_tokens,
    open_buffer,
    run_combine,
    run_dispatch,
)
from ep_oracle import Payload

SHAPE = Shape(ranks=4, experts_per_rank=2, max_tokens=64, hidden=2048, topk=4)
TIMEOUT_MS = 200
INPUTS = 3  # different inputs, in turn


@dataclass
class Service:
    """What one rank saw in one stretch of operations."""

    problems: list = field(default_factory=list)
    named: set = field(default_factory=set)  # peers named by fault_status()
    told_at: float | None = None  # when the operation that named the first of them had returned (monotonic)
    phases: list = field(default_factory=list)


def open_service(rank, tag: str, connect=None, timeout_ms: int = TIMEOUT_MS, shape: Shape = SHAPE):
    """Opens this process's buffer and keeps it in the rank's state; `tag` names the group's keys in the store."""
    for payload in (Payload.BF16, Payload.FP8):
        for seed in range(INPUTS):
            expected_dispatch(rank, shape, payload, seed, frozenset())
            expected_combine(rank, shape, seed, frozenset())
    rank.state["buffer"] = open_buffer(rank, shape, timeout_ms=timeout_ms, connect=connect, store=rank.store(tag))


def close_service(rank):
    rank.state.pop("buffer").destroy()


def cached(function):
    """Keeps results in the rank's state, so that operations follow one another without arithmetic in between."""

    @functools.wraps(function)
    def call(rank, *key):
        cache = rank.state.setdefault(function.__name__, {})
        if key not in cache:
            cache[key] = function(rank, *key)
        return cache[key]

    return call


@cached
def group_inputs(rank, shape: Shape, seed: int):
    tokens = {r: make_tokens(shape, seed, r, "plain") for r in range(shape.ranks)}
    routed = {payload: oracle.dispatch(shape.layout(), tokens, payload) for payload in (Payload.BF16, Payload.FP8)}
    y = {r: make_outputs(routed[Payload.BF16][r].src_info, shape.hidden, seed, r) for r in range(shape.ranks)}
    return tokens, routed, y


@cached
def expected_dispatch(rank, shape: Shape, payload: Payload, seed: int, lost: frozenset):
    """What this rank receives, and what its experts make of it, when nothing comes from `lost`."""
    _, routed, y = group_inputs(rank, shape, seed)
    return without(routed[payload][rank.rank], lost, y[rank.rank])


@cached
def expected_combine(rank, shape: Shape, seed: int, lost: frozenset):
    tokens, routed, y = group_inputs(rank, shape, seed)
    holders = oracle.all_links(shape.ranks, range(shape.ranks))
    holders[rank.rank, list(lost)] = False
    mine = {rank.rank: tokens[rank.rank]}
    return oracle.combine(shape.layout(), mine, routed[Payload.BF16], y, "exact", holders)[rank.rank]


def without(received: oracle.Received, lost, y):
    """A rank's outputs (and its experts' rows) when nothing of `lost` sources arrived."""
    keep = [[i for i, source in enumerate(sources) if source not in lost] for sources in received.source]
    pick = lambda rows: [values[chosen] for values, chosen in zip(rows, keep)]  # noqa: E731
    count = received.count.copy()
    ranges = received.layout_range.copy()
    for expert, chosen in enumerate(keep):
        count[expert] = len(chosen)
        first = 0
        for source in range(ranges.shape[1]):
            rows = 0 if source in lost else int(ranges[expert, source]) & 0xFFFFFFFF
            ranges[expert, source] = first << 32 | rows
            first += rows
    scales = None if received.scales is None else pick(received.scales)
    kept = oracle.Received(
        pick(received.x), scales, pick(received.source), pick(received.src_info), pick(received.slot), ranges, count
    )
    return kept, pick(y)


def serve(rank, operations: int, shape: Shape = SHAPE, lost=(), progress_from: int = 0) -> Service:
    """`operations` dispatches and combines; `lost`: peers already masked when this begins."""
    buffer, seen, lost = rank.state["buffer"], Service(), set(lost)
    for number in range(operations):
        rank.progress[rank.rank] = progress_from + number
        payload = (Payload.BF16, Payload.FP8)[number % 2]
        problems = one_operation(rank, buffer, seen, lost, shape, payload, number % INPUTS)
        seen.problems += [f"rank {rank.rank}, operation {number}, {payload.value}: {problem}" for problem in problems]
        if len(seen.problems) > 20:
            break
    rank.progress[rank.rank] = progress_from + operations
    return seen


def one_operation(rank, buffer, seen, lost, shape, payload, seed) -> list[str]:
    me, layout, options = rank.rank, shape.layout(), Options(payload)
    tokens, _, _ = group_inputs(rank, shape, seed)
    recv_x, count, handle, problems = run_dispatch(buffer, tokens[me], layout, options, rank.device)
    note_faults(rank, seen, lost)
    received, rows = expected_dispatch(rank, shape, payload, seed, frozenset(lost))
    problems += compare_dispatch(layout, payload, received, recv_x, count, handle)
    got, more = run_combine(buffer, tokens[me], layout, rows, handle, options, rank.device)
    note_faults(rank, seen, lost)
    return problems + more + compare_rows("combined", expected_combine(rank, shape, seed, frozenset(lost)), got)


def note_faults(rank, seen: Service, lost: set) -> None:
    if rank.device == "cuda":
        import torch

        torch.cuda.synchronize()
    returned = time.monotonic()
    for fault in rank.state["buffer"].fault_status():
        seen.named.add(fault.rank)
        seen.phases.append(str(fault.phase))
        lost.add(fault.rank)
        seen.told_at = seen.told_at or returned


def mask_values(rank, shape: Shape = SHAPE) -> list[int]:
    import torch

    status = torch.zeros(shape.capacity or shape.ranks, dtype=torch.int32, device=rank.device)
    rank.state["buffer"].query_mask_buffer(status)
    return bits_of(status).tolist()


def replace_peer(rank, victims, activate=True):
    """A survivor takes the new incarnations of `victims`."""
    buffer = rank.state["buffer"]
    buffer.disconnect_ranks(list(victims))
    buffer.connect_ranks(list(victims), activate)


def unmask_everyone(rank, name, ranks):
    """As clients do: all ranks at one boundary between operations, no connect."""
    rank.meet(f"{name} stopped", ranks)
    rank.state["buffer"].update_mask_buffer([r for r in ranks if r != rank.rank], False)
    rank.meet(f"{name} unmasked", ranks)
