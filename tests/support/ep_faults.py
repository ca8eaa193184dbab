"""Serving under faults: what every rank runs while a test kills or stops one of them, and how its outputs are judged.

A rank judges each operation by its own faults: peers named by then give nothing, all others everything, for all local
experts. So a rank that is half delivered, a fault told late, or a healthy rank masked is a difference to the oracle.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from dataclasses import dataclass, field

import ep_oracle as oracle
import numpy as np
from ep_cases import (
    Options,
    Shape,
    bits_of,
    compare_dispatch,
    compare_rows,
    make_tokens,
    open_buffer,
    run_combine,
    run_dispatch,
)
from ep_oracle import Payload

SHAPE = Shape(ranks=4, experts_per_rank=2, max_tokens=32, hidden=1024, topk=4)
TIMEOUT_MS = 500  # a loaded machine may keep a healthy rank off its cores for a while
INPUTS = 3  # different inputs, in turn
JUDGED = 12  # operations before, and as many after, the one that named somebody


@dataclass
class Service:
    """What one rank saw in one stretch of operations."""

    problems: list = field(default_factory=list)
    named: set = field(default_factory=set)  # peers named by fault_status()
    told_at: float | None = None  # when the operation that named the first of them had returned (monotonic)
    phases: list = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """What came out of one operation, kept to be judged when there is time: while a rank computes, peers wait for it."""

    payload: Payload
    seed: int
    received: tuple  # (recv_x, recv_count, handle)
    lost_by_dispatch: frozenset
    combined: object
    lost_by_combine: frozenset
    problems: list


def open_service(rank, tag: str, connect=None, timeout_ms: int = TIMEOUT_MS, shape: Shape = SHAPE):
    """Opens this process's buffer and keeps it in the rank's state; `tag` names the group's keys in the store."""
    for seed in range(INPUTS):  # what takes long in a fresh process happens before anyone waits for it
        group_inputs(rank, shape, seed)
    for payload in (Payload.BF16, Payload.FP8):
        sample = routed(rank, shape, payload, 0)[rank.rank]
        expert_output(sample.x[0], sample.scales and sample.scales[0], payload, 0)
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
    return {r: make_tokens(shape, seed, r, "plain") for r in range(shape.ranks)}


@cached
def routed(rank, shape: Shape, payload: Payload, seed: int):
    return oracle.dispatch(shape.layout(), group_inputs(rank, shape, seed), payload)


def expert_output(values, scales, payload: Payload, local: int):
    """What an expert makes of its rows, each by itself: so it is the same whoever else is missing."""
    with np.errstate(all="ignore"):
        return oracle.bf16_from_float(oracle.dequantize(values, scales, payload) * np.float32(2.0**-local))


@cached
def expected_dispatch(rank, shape: Shape, payload: Payload, seed: int, lost: frozenset):
    """What this rank receives when nothing comes from `lost`."""
    return without(routed(rank, shape, payload, seed)[rank.rank], lost)


@cached
def expected_combine(rank, shape: Shape, payload: Payload, seed: int, lost: frozenset, mode: str = "exact"):
    received = routed(rank, shape, payload, seed)
    y = {
        holder: [
            expert_output(rows, None if out.scales is None else out.scales[local], payload, local)
            for local, rows in enumerate(out.x)
        ]
        for holder, out in received.items()
    }
    holders = oracle.all_links(shape.ranks, range(shape.ranks))
    holders[rank.rank, list(lost)] = False
    mine = {rank.rank: group_inputs(rank, shape, seed)[rank.rank]}
    return oracle.combine(shape.layout(), mine, received, y, mode, holders)[rank.rank]


def without(received: oracle.Received, lost) -> oracle.Received:
    """A rank's outputs when nothing of `lost` sources arrived."""
    keep = [[i for i, source in enumerate(sources) if source not in lost] for sources in received.source]

    def pick(rows):
        return [values[chosen] for values, chosen in zip(rows, keep)]

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
    return oracle.Received(
        pick(received.x), scales, pick(received.source), pick(received.src_info), pick(received.slot), ranges, count
    )


def serve(rank, operations: int | None, shape: Shape = SHAPE, lost=(), leader: int | None = None) -> Service:
    """`operations` dispatches and combines, judged afterwards; `lost`: peers already masked when this begins.

    Without a number until the test wants an end: then `leader`, one that lives, says which operation is the last, and says it
    before the others can have finished the one before. Of so many the ones around faults, and the last, are judged.
    """
    seen, lost = Service(), set(lost)
    recent, chosen, follow = deque(maxlen=JUDGED), [], 0
    number = 0
    while not is_last(rank, number, operations, leader):
        rank.progress[rank.rank] = number
        payload = (Payload.BF16, Payload.FP8)[number % 2]
        named = len(seen.named)
        record = number, one_operation(rank, seen, lost, shape, payload, number % INPUTS)
        recent.append(record)
        if operations is not None or len(seen.named) > named or follow > 0:
            follow = JUDGED if len(seen.named) > named else follow - 1
            chosen += recent
            recent.clear()
        number += 1
    rank.progress[rank.rank] = number
    for number, record in chosen + list(recent):
        problems = judge(rank, shape, record)
        seen.problems += [f"rank {rank.rank}, operation {number}, {record.payload.value}: {p}" for p in problems]
    return seen


def is_last(rank, number: int, operations: int | None, leader: int | None, ahead: int = 0) -> bool:
    """Whether no operation `number` is to come; `ahead`: how many a rank may have begun beyond those that have ended."""
    if operations is not None:
        return number >= operations
    wanted, end = rank.ending
    if wanted and not end and rank.rank == leader:
        rank.ending[1] = end = number + 2 + ahead
    return 0 < end <= number


def one_operation(rank, seen: Service, lost: set, shape: Shape, payload: Payload, seed: int) -> Record:
    buffer, layout, options = rank.state["buffer"], shape.layout(), Options(payload)
    tokens = group_inputs(rank, shape, seed)[rank.rank]
    recv_x, count, handle, problems = run_dispatch(buffer, tokens, layout, options, rank.device)
    note_faults(rank, seen, lost)
    lost_by_dispatch = frozenset(lost)
    y = []
    for local, rows in enumerate(count.tolist()):
        values, scales = (recv_x, None) if payload is Payload.BF16 else recv_x
        scales = None if scales is None else bits_of(scales[local, :rows])
        y.append(expert_output(bits_of(values[local, :rows]), scales, payload, local))
    combined, more = run_combine(buffer, tokens, layout, y, handle, options, rank.device)
    note_faults(rank, seen, lost)
    received = (recv_x, count, handle)
    return Record(payload, seed, received, lost_by_dispatch, combined, frozenset(lost), problems + more)


def judge(rank, shape: Shape, record: Record) -> list[str]:
    key = rank, shape, record.payload, record.seed
    want = expected_dispatch(*key, record.lost_by_dispatch)
    problems = record.problems + compare_dispatch(shape.layout(), record.payload, want, *record.received)
    return problems + compare_rows("combined", expected_combine(*key, record.lost_by_combine), record.combined)


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
