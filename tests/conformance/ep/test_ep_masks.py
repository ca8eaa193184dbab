"""Masks: what they read, what they refuse, and what operations give under them."""

from dataclasses import replace

import ep_oracle as oracle
import pytest
from ep_cases import (
    Options,
    Shape,
    bits_of,
    compare_rows,
    expected_operation,
    group_operation,
    make_tokens,
    no_problems,
    open_buffer,
    run_combine,
    run_dispatch,
    run_operation,
)
from ep_oracle import Payload

SHAPE = Shape()
BF16 = Options()


def read_mask(buffer, capacity, device):
    import torch

    status = torch.full((capacity,), 99, dtype=torch.int32, device=device)
    buffer.query_mask_buffer(status)
    return bits_of(status).tolist()


def mask_values(rank):
    import torch

    shape = replace(SHAPE, capacity=6)
    buffer = open_buffer(rank, shape, connect=[])
    me, seen = rank.rank, {}
    seen["new"] = read_mask(buffer, 6, rank.device)
    buffer.connect_ranks([0, 1, 2, 3])
    seen["connected"] = read_mask(buffer, 6, rank.device)
    other, third = (r for r in range(3) if r != me) if me < 3 else (0, 1)
    seen["others"] = (other, third)
    buffer.update_mask_buffer(other, True)
    seen["masked"] = read_mask(buffer, 6, rank.device)
    buffer.update_mask_buffer(other)
    seen["default unmasks"] = read_mask(buffer, 6, rank.device)
    buffer.update_mask_buffer([other, third], True)
    seen["list"] = read_mask(buffer, 6, rank.device)
    buffer.update_mask_buffer(torch.tensor([other, third], dtype=torch.int32, device=rank.device), False)
    seen["tensor"] = read_mask(buffer, 6, rank.device)
    buffer.update_mask_buffer(other, True)
    buffer.update_mask_buffer(5, True)  # not connected: allowed, changes nothing
    buffer.clean_mask_buffer()
    seen["clean"] = read_mask(buffer, 6, rank.device)
    table = torch.full((2, 3), 99, dtype=torch.int32, device=rank.device)
    buffer.query_mask_buffer(table)  # as many elements as ranks; the shape does not matter
    seen["table"] = bits_of(table).flatten().tolist()
    refused = {}
    for name, call in {
        "self": lambda: buffer.update_mask_buffer(me, True),
        "unmask unconnected": lambda: buffer.update_mask_buffer(4, False),
        "too high": lambda: buffer.update_mask_buffer(6, True),
        "negative": lambda: buffer.update_mask_buffer(-1, True),
        "self in list": lambda: buffer.update_mask_buffer([other, me], True),
        "short query": lambda: buffer.query_mask_buffer(torch.zeros(5, dtype=torch.int32, device=rank.device)),
        "long query": lambda: buffer.query_mask_buffer(torch.zeros(7, dtype=torch.int32, device=rank.device)),
        "wide query": lambda: buffer.query_mask_buffer(torch.zeros(6, dtype=torch.int64, device=rank.device)),
    }.items():
        try:
            call()
            refused[name] = None
        except RuntimeError as error:
            refused[name] = str(error)
    seen["after refusals"] = read_mask(buffer, 6, rank.device)
    buffer.destroy()
    return seen, refused


def test_values_read_and_refusals(ranks_of):
    for me, (seen, refused) in ranks_of(4).run(mask_values).items():
        other, third = seen["others"]
        connected = [0, 0, 0, 0]
        assert seen["new"] == [0 if r == me else -1 for r in range(6)]
        for when in ("connected", "default unmasks", "tensor", "clean", "table", "after refusals"):
            assert seen[when][:4] == connected and all(seen[when][4:]), (when, seen[when])
        assert seen["masked"][:4] == [int(r == other) for r in range(4)]
        assert seen["list"][:4] == [int(r in (other, third)) for r in range(4)]
        for name, message in refused.items():
            assert message, f"{name} was not refused"


def run_islands(rank, lengths, combine):
    """Ranks 0, 1 and ranks 2, 3 mask each other, work for themselves, and come together again without a connect."""
    buffer = open_buffer(rank, SHAPE, combine)
    island = rank.rank // 2
    mine, others = ([0, 1], [2, 3]) if island == 0 else ([2, 3], [0, 1])
    problems, layout = [], SHAPE.layout()
    problems += run_operation(buffer, rank, group_operation(SHAPE, Payload.BF16, combine, 0), Options(combine=combine))
    for turn in range(3):
        buffer.update_mask_buffer(others, True)
        for number in range(lengths[island]):
            payload = list(Payload)[number % 4]
            seed = 10 * turn + number
            tokens = {r: make_tokens(SHAPE, seed, r) for r in range(4)}
            links = oracle.all_links(4, [0, 1]) | oracle.all_links(4, [2, 3])
            operation = expected_operation(layout, tokens, payload, combine, seed, links)
            problems += run_operation(buffer, rank, operation, Options(payload, combine=combine))
        rank.meet(f"apart {turn}", range(4))
        buffer.update_mask_buffer(others, False)
        rank.meet(f"together {turn}", range(4))
        for seed in (1, 2, 3):
            operation = group_operation(SHAPE, Payload.BF16, combine, seed)
            problems += run_operation(buffer, rank, operation, Options(combine=combine))
    problems += [f"fault {fault}" for fault in buffer.fault_status()]
    buffer.destroy()
    return problems


@pytest.mark.parametrize("lengths", [(1, 1), (3, 1), (0, 2)], ids=str)
@pytest.mark.parametrize("combine", ["exact", "reduced"])
def test_unmasked_ranks_are_in_step_whatever_they_did_apart(ranks_of, lengths, combine):
    no_problems(ranks_of(4).run(run_islands, lengths, combine))


def run_alone(rank):
    """As when a client warms up: everyone masked but self, then everyone back."""
    buffer = open_buffer(rank, SHAPE)
    others = [r for r in range(4) if r != rank.rank]
    buffer.update_mask_buffer(others, True)
    tokens = {r: make_tokens(SHAPE, 9, r) for r in range(4)}
    links = oracle.all_links(4, [rank.rank])
    operation = expected_operation(SHAPE.layout(), tokens, Payload.FP8, "exact", 9, links)
    problems = run_operation(buffer, rank, operation, Options(Payload.FP8))
    rank.meet("warm", range(4))
    buffer.clean_mask_buffer()
    rank.meet("clean", range(4))
    problems += run_operation(buffer, rank, group_operation(SHAPE, Payload.FP8, "exact", 1), Options(Payload.FP8))
    buffer.destroy()
    return problems


def test_only_self_active(ranks_of):
    no_problems(ranks_of(4).run(run_alone))


def run_bounds(rank):
    """The layout follows the highest active rank unless num_experts fixes it (EP-32, EP-34)."""
    import torch

    shape = replace(SHAPE, capacity=8)
    buffer = open_buffer(rank, shape)
    me, found = rank.rank, []

    def bound(num_experts=None):
        x = torch.zeros((0, shape.hidden), dtype=torch.bfloat16, device=rank.device)
        ids = torch.zeros((0, 2), dtype=torch.int64, device=rank.device)
        _, _, handle, _, _ = buffer.dispatch(x, ids, shape.max_tokens, num_experts, use_fp8=False)
        return handle[1].shape[1]

    found.append(bound())
    found.append(bound(8 * shape.experts_per_rank))
    found.append(bound(5 * shape.experts_per_rank))
    refused = []
    for wrong in (3 * shape.experts_per_rank, 4 * shape.experts_per_rank + 1, 9 * shape.experts_per_rank, 0):
        try:
            bound(wrong)
            refused.append(f"num_experts={wrong} was taken")
        except RuntimeError:
            pass
    masked = [r for r in (2, 3) if r != me]
    buffer.update_mask_buffer(masked, True)
    if me < 2:
        found.append(bound())
    buffer.update_mask_buffer(masked, False)
    buffer.destroy()
    return found, refused


def test_rank_bound(ranks_of):
    for rank, (found, refused) in ranks_of(4).run(run_bounds).items():
        assert not refused
        assert found == [4, 8, 5, 2][: 4 if rank < 2 else 3]


def run_hole(rank):
    """Rank ids 0, 2, 3 are connected; 1 never is. Ids owned by it are legal holes."""
    buffer = open_buffer(rank, SHAPE, connect=[0, 2, 3])
    problems = []
    for seed, payload in enumerate(Payload):
        operation = group_operation(SHAPE, payload, "exact", seed, present=(0, 2, 3))
        problems += run_operation(buffer, rank, operation, Options(payload))
    buffer.destroy()
    return problems


def test_absent_middle_rank_is_a_hole(ranks_of):
    no_problems(ranks_of(4).run(run_hole, ranks=[0, 2, 3]))


def run_masked_between(rank):
    """A rank masked after dispatch is left out of combine, without renormalising."""
    buffer = open_buffer(rank, SHAPE)
    layout = SHAPE.layout()
    tokens = {r: make_tokens(SHAPE, 3, r, "plain") for r in range(4)}
    pairs = oracle.all_links(4, [0, 1, 2]) | oracle.all_links(4, [3])
    operation = expected_operation(layout, tokens, Payload.BF16, "exact", 3, None, pairs)
    _, _, handle, problems = run_dispatch(buffer, tokens[rank.rank], layout, BF16, rank.device)
    buffer.update_mask_buffer([3] if rank.rank != 3 else [0, 1, 2], True)
    got, more = run_combine(buffer, tokens[rank.rank], layout, operation.y[rank.rank], handle, BF16, rank.device)
    problems += more + compare_rows("combined", operation.combined[rank.rank], got)
    rank.meet("combined", range(4))
    buffer.clean_mask_buffer()
    rank.meet("clean", range(4))
    problems += run_operation(buffer, rank, group_operation(SHAPE, Payload.BF16, "exact", 4), BF16)
    buffer.destroy()
    return problems


def test_masked_between_dispatch_and_combine(ranks_of):
    no_problems(ranks_of(4).run(run_masked_between))


def lone_stall(rank):
    """One rank sits out an operation: it is masked within the timeout, and unmasked again on both sides."""
    buffer = open_buffer(rank, SHAPE, timeout_ms=500)
    layout, problems = SHAPE.layout(), []
    operations = [group_operation(SHAPE, Payload.BF16, "exact", seed) for seed in range(5)]
    tokens = {r: make_tokens(SHAPE, 1, r) for r in range(4)}
    degraded = expected_operation(layout, tokens, Payload.BF16, "exact", 1, oracle.all_links(4, [0, 1, 2]))
    rank.meet("ready", range(4))
    problems += run_operation(buffer, rank, operations[0], BF16)
    if rank.rank != 3:
        problems += run_operation(buffer, rank, degraded, BF16)
        faults = buffer.fault_status()
        if {fault.rank for fault in faults} != {3}:
            problems.append(f"rank {rank.rank}: faults {faults}")
        if faults and not faults[0].phase:
            problems.append(f"a fault without phase: {faults[0]}")
        if buffer.fault_status():
            problems.append("fault_status() did not clear what it told")
        if read_mask(buffer, 4, rank.device) != [0, 0, 0, 1]:
            problems.append(f"mask {read_mask(buffer, 4, rank.device)}")
        failed = bits_of(buffer.fault_tensor())  # of the combine, which rank 3 was already out of
        if failed.any() or failed.dtype != "int32" or failed.shape != (4,):
            problems.append(f"fault tensor {failed.dtype} {failed.shape}")
    rank.meet("stalled", range(4))
    buffer.update_mask_buffer([r for r in range(4) if r != rank.rank], False)
    rank.meet("unmasked", range(4))
    for operation in operations[2:]:
        problems += run_operation(buffer, rank, operation, BF16)
    problems += [f"late fault {fault}" for fault in buffer.fault_status()]
    buffer.destroy()
    return problems


def test_stalled_rank_is_masked_then_served_again(ranks_of):
    no_problems(ranks_of(4).run(lone_stall))
