"""Ranks join, leave and come back; buffers grow; connects fail cleanly."""

import os
import threading
import time
from dataclasses import replace

import ep_oracle as oracle
import pytest
from ep_cases import (
    Options,
    Shape,
    expected_operation,
    expert_rows,
    group_operation,
    make_tokens,
    memory_bytes,
    no_problems,
    open_buffer,
    run_operation,
    run_operations,
    tensor_bf16,
)
from ep_fixtures import ALL
from ep_oracle import Payload

SHAPE = Shape()


# --------------------------------------------------------------------------------------------------------------- joining


def join_after(rank, operations, combine):
    problems = []
    if rank.rank < 2:
        buffer = open_buffer(rank, SHAPE, combine, connect=[0, 1])
        problems += run_operations(buffer, rank, [0, 1], operations, combine=combine)
        buffer.connect_ranks([2, 3])
    else:
        buffer = open_buffer(rank, SHAPE, combine)
    problems += run_operations(buffer, rank, range(4), 3, first=10, combine=combine)
    buffer.destroy()
    return problems


@pytest.mark.parametrize("operations", [0, 1, 2, 3])
@pytest.mark.parametrize("combine", ["exact", "reduced"])
def test_join_after_any_number_of_operations(ranks_of, operations, combine):
    """EP-45; section 8 row 1."""
    no_problems(ranks_of(4).run(join_after, operations, combine))


def leave_and_return(rank):
    """A middle rank leaves; the same id comes back with a new buffer, over and over, after odd counts too."""
    store = rank.store()
    buffer = open_buffer(rank, SHAPE, store=store)
    problems = run_operations(buffer, rank, range(4), 1)
    for turn in range(3):
        if rank.rank == 1:
            buffer.destroy()
            buffer = open_buffer(rank, SHAPE, store=store)
        else:
            buffer.disconnect_ranks([1])
            problems += run_operations(buffer, rank, [0, 2, 3], turn + 1, first=20)
            buffer.connect_ranks([1])
        problems += run_operations(buffer, rank, range(4), turn + 1, first=30)
    buffer.destroy()
    return problems


def test_middle_rank_leaves_and_returns(ranks_of):
    no_problems(ranks_of(4).run(leave_and_return))


def shrink_and_grow(rank):
    """A client's scaling: the highest ranks go, and come again."""
    store = rank.store()
    problems = []
    buffer = open_buffer(rank, SHAPE, store=store)
    for turn in range(2):
        problems += run_operations(buffer, rank, range(4), 2, first=turn)
        if rank.rank >= 2:
            buffer.destroy()
            buffer = open_buffer(rank, SHAPE, store=store)
        else:
            buffer.disconnect_ranks([2, 3])
            problems += run_operations(buffer, rank, [0, 1], 1, first=turn, ranks=2)
            buffer.connect_ranks([3, 2])
    problems += run_operations(buffer, rank, range(4), 2)
    buffer.destroy()
    return problems


def test_shrink_and_grow(ranks_of):
    no_problems(ranks_of(4).run(shrink_and_grow))


def staged_join(rank):
    """Rank 3 is connected by background threads while ranks 0, 1, 2 serve, and takes part from the commit on."""
    store, problems = rank.store(), []
    serving = [0, 1, 2]
    if rank.rank == 3:
        store.wait([f"serving/{r}" for r in serving])
        buffer = open_buffer(rank, SHAPE)
    else:
        buffer = open_buffer(rank, SHAPE, connect=serving)
        problems += run_operations(buffer, rank, serving, 2)
        failures = []

        def stage():
            try:
                buffer.connect_ranks([3], activate=False)
            except Exception as error:  # shown by the serving thread
                failures.append(repr(error))

        thread = threading.Thread(target=stage)
        thread.start()
        for number in range(30):
            problems += run_operations(buffer, rank, serving, 3, first=number)
            if number == 3:
                store.set(f"serving/{rank.rank}", b"1")
        thread.join()
        problems += failures
        rank.meet("served", serving)
        buffer.update_mask_buffer(3, False)
    rank.meet("commit", range(4))
    problems += run_operations(buffer, rank, range(4), 5)
    problems += [f"fault {fault}" for fault in buffer.fault_status()]
    buffer.destroy()
    return problems


def test_connect_from_another_thread_while_serving(ranks_of):
    """EP-62, EP-63; section 8 row 2."""
    no_problems(ranks_of(4).run(staged_join))


def sparse_ids(rank, capacity):
    """Two ranks at the ends of a capacity (section 8 row 8)."""
    shape = Shape(ranks=capacity, experts_per_rank=1, max_tokens=4, hidden=128, topk=min(4, capacity))
    ids = sorted({0, capacity - 1})
    me = replace(rank, rank=ids[rank.rank])
    buffer = open_buffer(me, shape, connect=list(reversed(ids)))
    buffer.barrier()
    problems = run_operations(buffer, me, ids, 3, ranks=capacity, shape=shape)
    buffer.destroy()
    return problems


@pytest.mark.parametrize("capacity", [1, 2, 3, 9, 12, 33, 100])
def test_any_rank_capacity(ranks_of, capacity):
    no_problems(ranks_of(min(capacity, 2)).run(sparse_ids, capacity))


# ---------------------------------------------------------------------------------------------------------------- growth


def grow(rank):
    """Capacity 2 becomes 4 on running buffers; other changes are refused and change nothing."""
    small = replace(SHAPE, capacity=2)
    problems = []
    if rank.rank < 2:
        buffer = open_buffer(rank, small, connect=[0, 1])
        problems += run_operations(buffer, rank, [0, 1], 3, ranks=2)
        try:
            buffer.update_memory_buffers(4, SHAPE.experts_per_rank + 1, memory_bytes(SHAPE))
            problems.append("the number of experts a rank was changed")
        except RuntimeError as error:
            if "Multiple calls to update_memory_buffers are not supported" not in str(error):
                problems.append(f"refused with {error}")
        problems += run_operations(buffer, rank, [0, 1], 1, ranks=2)
        buffer.update_memory_buffers(4, SHAPE.experts_per_rank, memory_bytes(SHAPE))
        if buffer.group_size != 4:
            problems.append(f"group_size is {buffer.group_size}")
        problems += run_operations(buffer, rank, [0, 1], 2, ranks=2)  # connections stay
        rank.meet("grown", [0, 1])
        buffer.connect_ranks([2, 3])
    else:
        buffer = open_buffer(rank, SHAPE)
    problems += run_operations(buffer, rank, range(4), 4)
    buffer.destroy()
    return problems


def test_capacity_grows(ranks_of):
    no_problems(ranks_of(4).run(grow))


def zero_exposed(rank):
    """Clients zero what get_local_buffer_tensor shows, at different times on different ranks (EP-22)."""
    import torch

    buffer = open_buffer(rank, SHAPE)
    problems = []
    for turn in range(6):
        problems += run_operations(buffer, rank, range(4), 1, first=turn)
        if (turn + rank.rank) % 3 == 0:
            view = buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True)
            if view.numel() > memory_bytes(SHAPE):
                problems.append(f"{view.numel()} bytes shown, {memory_bytes(SHAPE)} given")
            view.zero_()
            buffer.clean_buffer(SHAPE.max_tokens, SHAPE.hidden, 8)
    buffer.destroy()
    return problems


def test_exposed_memory_may_be_zeroed_between_operations(ranks_of):
    no_problems(ranks_of(4).run(zero_exposed))


# -------------------------------------------------------------------------------------------------------------- connect


def absent_peer(rank):
    """Rank 2 never comes: a bounded failure that names it and leaves nothing; then all connect."""
    os.environ["NIXL_EP_CONNECT_TIMEOUT_MS"] = "300"
    problems = []
    try:
        buffer = open_buffer(rank, SHAPE, connect=[0, 1])
        problems += run_operations(buffer, rank, [0, 1], 1)
        for turn in range(2):
            try:
                buffer.connect_ranks([2, 1])
                problems.append("a connect with an absent rank returned")
            except RuntimeError as error:
                if "2" not in str(error):
                    problems.append(f"does not name rank 2: {error}")
            problems += run_operations(buffer, rank, [0, 1], 1)
            rank.meet(f"failed {turn}", [0, 1])
    finally:
        del os.environ["NIXL_EP_CONNECT_TIMEOUT_MS"]
    buffer.destroy()
    return problems


def test_absent_peer_is_named_in_bounded_time(ranks_of):
    """EP-61; section 8 row 3."""
    no_problems(ranks_of(4).run(absent_peer, ranks=[0, 1], timeout=30))


def refused_lists(rank):
    buffer = open_buffer(rank, SHAPE, connect=[])
    problems = []
    for name, call in {
        "connect nobody": lambda: buffer.connect_ranks([]),
        "connect past capacity": lambda: buffer.connect_ranks([4]),
        "connect negative": lambda: buffer.connect_ranks([-1]),
        "disconnect nobody": lambda: buffer.disconnect_ranks([]),
        "disconnect unconnected": lambda: buffer.disconnect_ranks([1]),
        "disconnect self": lambda: buffer.disconnect_ranks([rank.rank]),
    }.items():
        try:
            call()
            problems.append(f"{name} was taken")
        except RuntimeError:
            pass
    buffer.connect_ranks([rank.rank])  # own rank alone is allowed and does nothing
    buffer.connect_ranks([3, 0, 2, 1, 0])
    buffer.connect_ranks(list(range(4)))  # connected ids are passed over, without waiting for anyone
    problems += run_operations(buffer, rank, range(4), 2)
    buffer.destroy()
    return problems


def test_refused_lists_leave_the_buffer_usable(ranks_of):
    no_problems(ranks_of(4).run(refused_lists))


def two_buffers(rank):
    """Several buffers in one process, side by side and one after another, with equal and other shapes."""
    other = Shape(ranks=4, experts_per_rank=1, max_tokens=3, hidden=128, topk=2)
    stores = [rank.store(f"{rank.call}/{n}") for n in range(2)]
    first = open_buffer(rank, SHAPE, store=stores[0])
    second = open_buffer(rank, other, store=stores[1], combine="reduced")
    problems = []
    for seed in range(3):
        problems += run_operations(first, rank, range(4), 1, first=seed)
        operation = group_operation(other, Payload.BF16, "reduced", seed)
        problems += run_operation(second, rank, operation, Options(combine="reduced"))
    first.destroy()
    operation = group_operation(other, Payload.BF16, "reduced", 7)
    problems += run_operation(second, rank, operation, Options(combine="reduced"))
    second.destroy()
    return problems


def test_several_buffers_in_one_process(ranks_of):
    no_problems(ranks_of(4).run(two_buffers))


def finish_queued(rank):
    """On CUDA a barrier is only queued."""
    if rank.device == "cuda":
        import torch

        torch.cuda.synchronize()


def meet_at_barrier(rank):
    buffer = open_buffer(rank, SHAPE)
    store, problems = rank.store(), []
    keys = [f"barrier/{turn}/{r}" for turn in range(3) for r in range(4)]
    for turn in range(3):
        store.set(f"barrier/{turn}/{rank.rank}", b"1")
        store.wait([f"barrier/{turn}/{rank.rank}"])  # set alone may still be on its way
        buffer.barrier()
        finish_queued(rank)
        if not store.check(keys[4 * turn : 4 * turn + 4]):
            problems.append(f"rank {rank.rank} left barrier {turn} before all had come")
        if turn == 1:
            problems += run_operations(buffer, rank, range(4), 1)
    buffer.destroy()
    return problems


def test_barrier(ranks_of):
    no_problems(ranks_of(4).run(meet_at_barrier))


def leave_with_operations_queued(rank):
    """Rank 0 destroys its buffer while its last dispatch and combine wait behind other work: the others get all of its rows."""
    import torch

    buffer = open_buffer(rank, SHAPE)
    operation = group_operation(SHAPE, Payload.BF16, "exact", 7)
    problems = []
    if rank.rank != 0:
        problems = run_operation(buffer, rank, operation, Options(Payload.BF16))
        problems += [f"rank {rank.rank}: {fault}" for fault in buffer.fault_status()]
        buffer.destroy()
        return problems
    tokens, layout = operation.tokens[0], operation.layout
    x, y = tensor_bf16(tokens.x, rank.device), expert_rows(layout, operation.y[0], rank.device)
    ids, weights = (torch.from_numpy(array).to(rank.device) for array in (tokens.topk_idx, tokens.topk_weights))
    if rank.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)  # clock cycles: 50 ms
    _, _, handle, _, _ = buffer.dispatch(x, ids, layout.max_tokens, layout.experts, use_fp8=False)
    buffer.combine(y, ids, weights, handle)
    buffer.destroy()
    return problems


def test_leaving_with_operations_queued(ranks_of):
    no_problems(ranks_of(4).run(leave_with_operations_queued))


def left_alone_at_barrier(rank):
    """A barrier that someone misses masks that one, and the next one is in step again."""
    buffer = open_buffer(rank, SHAPE, timeout_ms=500)
    problems = []
    for seed in range(3):
        group_operation(SHAPE, list(Payload)[seed % 4], "exact", seed, present=tuple(range(4)), ranks=4)  # takes its time now
    rank.meet("ready", range(4))
    if rank.rank != 0:
        buffer.barrier()
        finish_queued(rank)  # "missed" is met by ranks that have given rank 0 up
        faults = buffer.fault_status()
        if {fault.rank for fault in faults} != {0}:
            problems.append(f"faults {faults}")
    rank.meet("missed", range(4))
    buffer.clean_mask_buffer()
    rank.meet("clean", range(4))
    buffer.barrier()
    problems += run_operations(buffer, rank, range(4), 3)
    buffer.barrier()
    finish_queued(rank)
    problems += [f"late {fault}" for fault in buffer.fault_status()]
    buffer.destroy()
    return problems


def test_missed_barrier_resynchronises(ranks_of):
    no_problems(ranks_of(4).run(left_alone_at_barrier))


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def many_cycles(rank, cycles):
    """Connect, use, disconnect, many times: no descriptor and no mapping stays behind."""
    store = rank.store()
    shape = Shape(ranks=2, max_tokens=64, hidden=1024)
    buffer = open_buffer(rank, shape, connect=[], store=store)
    peer, problems, marks = 1 - rank.rank, [], []
    for cycle in range(cycles):
        buffer.connect_ranks([peer])
        problems += run_operations(buffer, rank, range(2), 1, first=cycle % 3, ranks=2, shape=shape)
        rank.meet(f"done {cycle}", range(2))
        buffer.disconnect_ranks([peer])
        if cycle in (cycles // 2, cycles - 1):
            with open("/proc/self/maps") as file:
                mappings = len(file.readlines())
            marks.append((len(os.listdir("/proc/self/fd")), mappings, resident_bytes()))
    buffer.destroy()
    (fds, mappings, resident), (fds_after, mappings_after, resident_after) = marks
    if fds_after > fds or mappings_after > mappings + 4 or resident_after > resident * 1.05:
        problems.append(f"descriptors, mappings, bytes: {marks[0]} grew to {marks[1]}")
    return problems


def test_cycles_leave_nothing_behind(ranks_of):
    """4.5; section 8 row 16."""
    no_problems(ranks_of(2).run(many_cycles, 1000 if ALL else 60, timeout=300))


def destroy_while_used(rank):
    """A rank that the others have masked may destroy its buffer while they dispatch."""
    buffer = open_buffer(rank, SHAPE)
    problems = run_operations(buffer, rank, range(4), 2)
    if rank.rank == 2:
        rank.meet("masked", range(4))
        buffer.destroy()
        return problems
    buffer.update_mask_buffer(2, True)
    rank.meet("masked", range(4))
    present = [0, 1, 3]
    for seed in range(20):
        tokens = {r: make_tokens(SHAPE, seed, r) for r in range(4)}
        operation = expected_operation(
            SHAPE.layout(), tokens, Payload.BF16, "exact", seed, oracle.all_links(4, present)
        )
        problems += run_operation(buffer, rank, operation, Options())
    buffer.destroy()
    return problems


def test_masked_peer_destroys_while_others_work(ranks_of):
    no_problems(ranks_of(4).run(destroy_while_used))
