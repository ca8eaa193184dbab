"""What calls return beside the rows: statistics, handles, lifetime of outputs, events, dropped ids."""

import time

import ep_oracle as oracle
import numpy as np
import pytest
from ep_cases import (
    Options,
    Shape,
    bits_of,
    compare_dispatch,
    compare_rows,
    group_operation,
    make_outputs,
    no_problems,
    open_buffer,
    run_combine,
    run_dispatch,
    run_operation,
    tensor_bf16,
)
from ep_oracle import Payload, Tokens

SHAPE = Shape()
BF16 = Options()


def count_statistics(rank):
    import torch

    buffer = open_buffer(rank, SHAPE)
    start = torch.arange(SHAPE.experts_per_rank, dtype=torch.int32, device=rank.device) * 100
    stats, want, problems = start.clone(), bits_of(start).copy(), []
    for seed in range(3):
        operation = group_operation(SHAPE, Payload.BF16, "exact", seed)
        tokens = operation.tokens[rank.rank]
        run_dispatch(buffer, tokens, operation.layout, BF16, rank.device, cumulative_local_expert_recv_stats=stats)
        want += operation.received[rank.rank].count
        problems += compare_rows(f"statistics after {seed + 1}", want, bits_of(stats))
    buffer.destroy()
    return problems


def test_receive_statistics_are_added(ranks_of):
    no_problems(ranks_of(4).run(count_statistics))


def measure_waits(rank, late):
    import torch

    buffer = open_buffer(rank, SHAPE)
    dispatch_cost = torch.full((SHAPE.ranks,), 7, dtype=torch.int64, device=rank.device)
    combine_cost = dispatch_cost.clone()
    operation = group_operation(SHAPE, Payload.BF16, "exact", 1, "plain")
    tokens = operation.tokens[rank.rank]
    for phase in ("dispatch", "combine"):
        if rank.rank == late:
            time.sleep(0.1)  # the thing measured
        if phase == "dispatch":
            _, _, handle, _ = run_dispatch(
                buffer, tokens, operation.layout, BF16, rank.device, dispatch_wait_recv_cost_stats=dispatch_cost
            )
        else:
            y = operation.y[rank.rank]
            run_combine(
                buffer, tokens, operation.layout, y, handle, BF16, rank.device, combine_wait_recv_cost_stats=combine_cost
            )
    buffer.destroy()
    return bits_of(dispatch_cost).tolist(), bits_of(combine_cost).tolist()


def test_wait_costs_are_added_and_name_the_late_rank(ranks_of):
    for rank, costs in ranks_of(4).run(measure_waits, 2).items():
        for cost in costs:
            assert min(cost) >= 7, cost
            if rank != 2:
                assert cost[2] > 7 and cost[2] == max(cost), (rank, cost)


def combine_again(rank):
    """Several combines of one handle, different rows each time; then handles used out of order."""
    buffer = open_buffer(rank, SHAPE)
    problems, held = [], []
    for seed in range(3):
        operation = group_operation(SHAPE, Payload.BF16, "exact", seed)
        tokens = operation.tokens[rank.rank]
        recv_x, count, handle, _ = run_dispatch(buffer, tokens, operation.layout, BF16, rank.device)
        held.append((operation, recv_x, count, handle))
    for seed, (operation, recv_x, count, handle) in enumerate(reversed(held)):
        received = operation.received
        problems += compare_dispatch(operation.layout, Payload.BF16, received[rank.rank], recv_x, count, handle)
        for again in range(2):
            rows = {r: make_outputs(received[r].src_info, SHAPE.hidden, 10 * seed + again, r) for r in received}
            want = oracle.combine(operation.layout, operation.tokens, received, rows)[rank.rank]
            form = handle if again == 0 else (*handle, operation.layout.experts)  # the older five elements
            mine = operation.tokens[rank.rank]
            got, more = run_combine(buffer, mine, operation.layout, rows[rank.rank], form, BF16, rank.device)
            problems += more + compare_rows(f"combine {again} of operation {2 - seed}", want, got)
    buffer.destroy()
    return problems


def test_outputs_stay_and_handles_combine_more_than_once(ranks_of):
    no_problems(ranks_of(4).run(combine_again))


def dispatch_only(rank):
    buffer = open_buffer(rank, SHAPE)
    problems = []
    for seed in range(5):
        payload = Payload.FP8 if seed % 2 else Payload.BF16
        operation = group_operation(SHAPE, payload, "exact", seed)
        recv_x, count, handle, more = run_dispatch(
            buffer, operation.tokens[rank.rank], operation.layout, Options(payload), rank.device
        )
        problems += more + compare_dispatch(
            operation.layout, payload, operation.received[rank.rank], recv_x, count, handle
        )
    problems += run_operation(buffer, rank, operation, Options(payload))
    buffer.destroy()
    return problems


def test_dispatch_without_combine(ranks_of):
    no_problems(ranks_of(4).run(dispatch_only))


def aliases_and_full_names(rank):
    """low_latency_* are the same calls; positional use as in the clients."""
    import torch

    buffer = open_buffer(rank, SHAPE)
    operation = group_operation(SHAPE, Payload.FP8, "exact", 3)
    tokens, layout = operation.tokens[rank.rank], operation.layout
    x, ids = tensor_bf16(tokens.x, rank.device), torch.from_numpy(tokens.topk_idx).to(rank.device)
    recv_x, count, handle, event, hook = buffer.low_latency_dispatch(x, ids, layout.max_tokens, layout.experts)
    problems = compare_dispatch(layout, Payload.FP8, operation.received[rank.rank], recv_x, count, handle)
    if event.event is not None or event.extra_tensors is not None or hook is not None:
        problems.append(f"event {event.event} {event.extra_tensors}, hook {hook}")
    y = torch.full((layout.experts_per_rank, layout.rows, layout.hidden), float("nan"), dtype=torch.bfloat16)
    for expert, rows in enumerate(operation.y[rank.rank]):
        y[expert, : len(rows)] = tensor_bf16(rows, "cpu")
    out, event, hook = buffer.low_latency_combine(
        x=y.to(rank.device),
        topk_idx=ids,
        topk_weights=torch.from_numpy(tokens.topk_weights).to(rank.device),
        handle=handle,
        async_finish=True,
        return_recv_hook=False,
    )
    event.current_stream_wait()
    if not event.extra_tensors:
        problems.append("an asynchronous call keeps no tensors")
    problems += compare_rows("combined", operation.combined[rank.rank], bits_of(out))
    buffer.destroy()
    return problems


def test_full_names(ranks_of):
    no_problems(ranks_of(4).run(aliases_and_full_names))


def under_other_defaults(rank):
    """EP-3: torch's defaults for dtype and device change nothing."""
    import torch

    torch.set_default_dtype(torch.bfloat16)
    try:
        buffer = open_buffer(rank, SHAPE)
        problems = []
        for seed, payload in enumerate(Payload):
            operation = group_operation(SHAPE, payload, "exact", seed)
            problems += run_operation(buffer, rank, operation, Options(payload, out=True))
        buffer.destroy()
    finally:
        torch.set_default_dtype(torch.float32)
    return problems


def test_default_dtype_does_not_matter(ranks_of):
    no_problems(ranks_of(4).run(under_other_defaults))


def foreign_ids(rank):
    """Ids past the layout are dropped; the next call says so once; then everything goes on."""
    buffer = open_buffer(rank, SHAPE)
    operation = group_operation(SHAPE, Payload.BF16, "exact", 4, "plain")
    layout, good = operation.layout, operation.tokens
    ids = {r: good[r].topk_idx.copy() for r in good}
    for r in ids:
        ids[r][0, 0] = layout.experts
        ids[r][1, 1] = 2**31 - 1
    tokens = {r: Tokens(good[r].x, ids[r], good[r].topk_weights) for r in good}
    received = oracle.dispatch(layout, tokens, Payload.BF16)
    y = {r: make_outputs(received[r].src_info, layout.hidden, 4, r) for r in received}
    want = oracle.combine(layout, tokens, received, y)
    mine = rank.rank
    recv_x, count, handle, problems = run_dispatch(buffer, tokens[mine], layout, BF16, rank.device)
    problems += compare_dispatch(layout, Payload.BF16, received[mine], recv_x, count, handle)
    try:
        run_combine(buffer, tokens[mine], layout, y[mine], handle, BF16, rank.device)
        problems.append("nobody said that ids were out of range")
    except RuntimeError as error:
        if str(layout.experts) not in str(error):
            problems.append(f"the message does not name the bound: {error}")
    legal = np.where(ids[mine] < layout.experts, ids[mine], -1)
    again = Tokens(good[mine].x, legal, good[mine].topk_weights)
    got, more = run_combine(buffer, again, layout, y[mine], handle, BF16, rank.device)
    problems += more + compare_rows("combined", want[mine], got)
    problems += run_operation(buffer, rank, operation, BF16)
    buffer.destroy()
    return problems


def test_ids_out_of_range_are_dropped_and_reported(ranks_of):
    no_problems(ranks_of(4).run(foreign_ids))


def too_many_copies(rank):
    """More than M selections of one expert by one rank: nothing is overwritten, the error is told, work goes on."""
    buffer = open_buffer(rank, SHAPE)
    operation = group_operation(SHAPE, Payload.BF16, "exact", 6, "plain")
    layout, tokens = operation.layout, dict(operation.tokens)
    tokens[1] = Tokens(tokens[1].x, np.zeros_like(tokens[1].topk_idx), tokens[1].topk_weights)
    received = oracle.dispatch(layout, tokens, Payload.BF16)
    y = {r: make_outputs(received[r].src_info, layout.hidden, 6, r) for r in received}
    mine, rows = tokens[rank.rank], y[rank.rank]
    recv_x, count, handle, problems = run_dispatch(buffer, mine, layout, BF16, rank.device)
    problems += compare_dispatch(layout, Payload.BF16, received[rank.rank], recv_x, count, handle)
    told = ""
    try:
        got, more = run_combine(buffer, mine, layout, rows, handle, BF16, rank.device)
    except RuntimeError as error:
        told = str(error)
        got, more = run_combine(buffer, mine, layout, rows, handle, BF16, rank.device)
    want = oracle.combine(layout, tokens, received, y)[rank.rank]
    problems += more + compare_rows("combined", want, got)
    problems += run_operation(buffer, rank, operation, BF16)
    buffer.destroy()
    return problems, told


def test_copies_beyond_the_bound_are_reported(ranks_of):
    results = ranks_of(4).run(too_many_copies)
    no_problems({rank: problems for rank, (problems, _) in results.items()})
    assert "expert 0" in results[1][1], f"the rank that selected expert 0 too often was told {results[1][1]!r}"


def logfmt(rank, payload, hidden):
    shape = Shape(max_tokens=32, hidden=hidden)
    buffer = open_buffer(rank, shape)
    layout, differences = shape.layout(), []
    for seed, scale in enumerate((0.1, 1.0, 100.0)):
        base = group_operation(shape, payload, "exact", seed, "plain")
        y = {r: [] for r in base.received}
        for r, received in base.received.items():
            rng = np.random.default_rng([seed, r])
            for rows in received.src_info:
                values = rng.standard_normal((len(rows), hidden), np.float32) * np.float32(scale)
                y[r].append(oracle.bf16_from_float(values))
        want = oracle.combine(layout, base.tokens, base.received, y)[rank.rank]
        tokens = base.tokens[rank.rank]
        _, _, handle, _ = run_dispatch(buffer, tokens, layout, Options(payload), rank.device)
        got, problems = run_combine(buffer, tokens, layout, y[rank.rank], handle, BF16, rank.device, use_logfmt=True)
        assert not problems, problems
        differences.append(oracle.calc_diff(oracle.float_from_bf16(want), oracle.float_from_bf16(got)))
    buffer.destroy()
    return differences


@pytest.mark.parametrize("hidden", [512, 1024, 128])
def test_logfmt_stays_within_its_bound(ranks_of, hidden):
    for differences in ranks_of(4).run(logfmt, Payload.BF16, hidden).values():
        assert max(differences) < 9e-4, differences
