"""Wrong arguments: each a clear exception, and the buffer goes on working."""

import subprocess
import sys
import textwrap

import pytest
from ep_cases import Options, Shape, group_operation, no_problems, open_buffer, run_operation
from ep_oracle import Payload

SHAPE = Shape(ranks=2)
HIDDEN, TOKENS, TOPK = SHAPE.hidden, SHAPE.max_tokens, SHAPE.topk


def good_dispatch(torch, device):
    return {
        "x": torch.zeros((TOKENS, HIDDEN), dtype=torch.bfloat16, device=device),
        "topk_idx": torch.zeros((TOKENS, TOPK), dtype=torch.int64, device=device) - 1,
        "num_max_dispatch_tokens_per_rank": TOKENS,
        "num_experts": 4,
        "use_fp8": True,
    }


def wrong_dispatches(torch, device):
    def x(*shape, dtype=torch.bfloat16):
        return {"x": torch.zeros(shape, dtype=dtype, device=device)}

    def ids(*shape, dtype=torch.int64):
        return {"topk_idx": torch.zeros(shape, dtype=dtype, device=device) - 1}

    def stats(name, size, dtype):
        return {name: torch.zeros(size, dtype=dtype, device=device)}

    return {
        "x float32": x(TOKENS, HIDDEN, dtype=torch.float32),
        "x float16": x(TOKENS, HIDDEN, dtype=torch.float16),
        "x 1-D": x(HIDDEN),
        "x 3-D": x(TOKENS, HIDDEN, 1),
        "x columns not contiguous": {"x": torch.zeros((HIDDEN, TOKENS), dtype=torch.bfloat16, device=device).t()},
        "x rows apart": {"x": torch.zeros((TOKENS, 2 * HIDDEN), dtype=torch.bfloat16, device=device)[:, :HIDDEN]},
        "hidden not in groups": x(TOKENS, HIDDEN + 8),
        "hidden past the memory": x(TOKENS, 16 * HIDDEN),
        "x not a tensor": {"x": [[0.0] * HIDDEN] * TOKENS},
        "x None": {"x": None},
        "x complete but other length than ids": x(TOKENS - 1, HIDDEN),
        "more tokens than the bound": x(TOKENS + 1, HIDDEN) | ids(TOKENS + 1, TOPK),
        "ids int16": ids(TOKENS, TOPK, dtype=torch.int16),
        "ids float": ids(TOKENS, TOPK, dtype=torch.float32),
        "ids 1-D": ids(TOKENS),
        "ids not contiguous": {"topk_idx": torch.zeros((TOPK, TOKENS), dtype=torch.int64, device=device).t()},
        "top-k of 33": ids(TOKENS, 33),
        "bound of zero": {"num_max_dispatch_tokens_per_rank": 0},
        "bound negative": {"num_max_dispatch_tokens_per_rank": -4},
        "bound past the memory": {"num_max_dispatch_tokens_per_rank": 100_000},
        "experts not whole ranks": {"num_experts": 5},
        "experts below the bound": {"num_experts": 2},
        "experts past capacity": {"num_experts": 6},
        "ue8m0 without round_scale": {"use_ue8m0": True},
        "ue8m0 without fp8": {"use_fp8": False, "use_ue8m0": True, "round_scale": True},
        "ue8m0 of hidden 128": x(TOKENS, 128) | {"use_ue8m0": True, "round_scale": True},
        "async and hook": {"async_finish": True, "return_recv_hook": True},
        "statistics int64": stats("cumulative_local_expert_recv_stats", 2, torch.int64),
        "statistics too short": stats("cumulative_local_expert_recv_stats", 1, torch.int32),
        "costs int32": stats("dispatch_wait_recv_cost_stats", 2, torch.int32),
        "costs too short": stats("dispatch_wait_recv_cost_stats", 1, torch.int64),
        "weights bfloat16": stats("topk_weights", (TOKENS, TOPK), torch.bfloat16),
        "weights of other shape": stats("topk_weights", (TOKENS, TOPK + 1), torch.float32),
    }


def good_combine(torch, device, handle):
    return {
        "x": torch.zeros((2, 2 * TOKENS, HIDDEN), dtype=torch.bfloat16, device=device),
        "topk_idx": torch.zeros((TOKENS, TOPK), dtype=torch.int64, device=device) - 1,
        "topk_weights": torch.ones((TOKENS, TOPK), dtype=torch.float32, device=device),
        "handle": handle,
    }


def wrong_combines(torch, device, handle):
    src_info, layout_range, bound, hidden = handle

    def x(*shape, dtype=torch.bfloat16):
        return {"x": torch.zeros(shape, dtype=dtype, device=device)}

    def out(*shape, dtype=torch.bfloat16):
        return {"out": torch.zeros(shape, dtype=dtype, device=device)}

    def weights(*shape, dtype=torch.float32):
        return {"topk_weights": torch.zeros(shape, dtype=dtype, device=device)}

    return {
        "x float32": x(2, 2 * TOKENS, HIDDEN, dtype=torch.float32),
        "x 2-D": x(2 * TOKENS, HIDDEN),
        "x one expert short": x(1, 2 * TOKENS, HIDDEN),
        "x rows short": x(2, TOKENS, HIDDEN),
        "x hidden": x(2, 2 * TOKENS, 2 * HIDDEN),
        "x not contiguous": {"x": torch.zeros((2 * TOKENS, 2, HIDDEN), dtype=torch.bfloat16, device=device).transpose(0, 1)},
        "weights float64": weights(TOKENS, TOPK, dtype=torch.float64),
        "weights of other shape": weights(TOKENS, TOPK - 1),
        "weights None": {"topk_weights": None},
        "ids int8": {"topk_idx": torch.zeros((TOKENS, TOPK), dtype=torch.int8, device=device)},
        "out float32": out(TOKENS, HIDDEN, dtype=torch.float32),
        "out of other length": out(TOKENS + 1, HIDDEN),
        "out not contiguous": {"out": torch.zeros((HIDDEN, TOKENS), dtype=torch.bfloat16, device=device).t()},
        "logfmt and zero copy": {"use_logfmt": True, "zero_copy": True},
        "async and hook": {"async_finish": True, "return_recv_hook": True},
        "costs int32": {"combine_wait_recv_cost_stats": torch.zeros(2, dtype=torch.int32, device=device)},
        "handle None": {"handle": None},
        "handle of three": {"handle": handle[:3]},
        "handle src_info int64": {"handle": (src_info.long(), layout_range, bound, hidden)},
        "handle layout_range int32": {"handle": (src_info, layout_range.int(), bound, hidden)},
        "handle layout_range one rank": {"handle": (src_info, layout_range[:, :1].contiguous(), bound, hidden)},
        "handle of another bound": {"handle": (src_info, layout_range, bound + 1, hidden)},
        "handle of another hidden": {"handle": (src_info, layout_range, bound, 2 * hidden)},
    }


def refusals(problems, name, call):
    try:
        call()
        problems.append(f"{name}: taken")
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        if len(str(error)) < 8 or "incompatible function arguments" in str(error):
            problems.append(f"{name}: the message says nothing: {error!r}")


def wrong_arguments(rank, who):
    """Rank(s) `who` make wrong calls between right ones; nobody falls out of step by it."""
    import torch

    buffer = open_buffer(rank, SHAPE)
    problems = []
    good = group_operation(SHAPE, Payload.BF16, "exact", 1)
    problems += run_operation(buffer, rank, good, Options())
    _, _, handle, _, _ = buffer.dispatch(**good_dispatch(torch, rank.device))
    if rank.rank in who:
        for name, change in wrong_dispatches(torch, rank.device).items():
            arguments = good_dispatch(torch, rank.device) | change
            refusals(problems, f"dispatch, {name}", lambda arguments=arguments: buffer.dispatch(**arguments))
        for name, change in wrong_combines(torch, rank.device, handle).items():
            arguments = good_combine(torch, rank.device, handle) | change
            refusals(problems, f"combine, {name}", lambda arguments=arguments: buffer.combine(**arguments))
    out, _, _ = buffer.combine(**good_combine(torch, rank.device, handle))
    if out.count_nonzero():
        problems.append("a combine of nothing is not zero")
    for seed in (2, 3):
        problems += run_operation(buffer, rank, group_operation(SHAPE, Payload.FP8, "exact", seed), Options(Payload.FP8))
    buffer.destroy()
    return problems


@pytest.mark.parametrize("who", [(0, 1), (1,)], ids=str)
def test_wrong_arguments(ranks_of, who):
    no_problems(ranks_of(2).run(wrong_arguments, who))


def after_destroy(rank):
    import torch

    buffer = open_buffer(rank, SHAPE)
    _, _, handle, _, _ = buffer.dispatch(**good_dispatch(torch, rank.device))
    buffer.combine(**good_combine(torch, rank.device, handle))
    buffer.destroy()
    problems = [] if buffer.runtime is None else [f"runtime is {buffer.runtime}"]
    status = torch.zeros(2, dtype=torch.int32, device=rank.device)
    for name, call in {
        "dispatch": lambda: buffer.dispatch(**good_dispatch(torch, rank.device)),
        "combine": lambda: buffer.combine(**good_combine(torch, rank.device, handle)),
        "barrier": lambda: buffer.barrier(),
        "connect": lambda: buffer.connect_ranks([1 - rank.rank]),
        "disconnect": lambda: buffer.disconnect_ranks([1 - rank.rank]),
        "query": lambda: buffer.query_mask_buffer(status),
        "mask": lambda: buffer.update_mask_buffer(1 - rank.rank, True),
        "memory": lambda: buffer.update_memory_buffers(2, 2, 1 << 20),
        "view": lambda: buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True),
        "zero copy": lambda: buffer.get_next_combine_buffer(handle),
        "faults": lambda: buffer.fault_status(),
        "destroy": lambda: buffer.destroy(),
    }.items():
        refusals(problems, f"{name} after destroy", call)
    return problems


def test_use_after_destroy(ranks_of):
    no_problems(ranks_of(2).run(after_destroy))


def hooks_out_of_turn(rank):
    """A hook is called once, before the next operation; on CUDA no barrier comes in between."""
    import torch

    buffer = open_buffer(rank, SHAPE)
    problems = []

    def before_forgetting(turn):
        """On CUDA receiving keeps ranks in step: one that leaves it out may be two operations ahead and write over what nobody has read."""
        if rank.device == "cuda":
            torch.cuda.synchronize()
        rank.meet(f"before forgetting {turn}", range(2))

    arguments = good_dispatch(torch, rank.device) | {"return_recv_hook": True}
    _, _, handle, _, hook = buffer.dispatch(**arguments)
    if rank.device == "cuda":
        refusals(problems, "barrier before the hook of a dispatch", buffer.barrier)
    hook()
    refusals(problems, "hook of a dispatch called twice", hook)
    _, _, hook_of_combine = buffer.combine(**good_combine(torch, rank.device, handle), return_recv_hook=True)
    if rank.device == "cuda":
        refusals(problems, "barrier before the hook of a combine", buffer.barrier)
    refusals(problems, "hook of a dispatch after the next operation", hook)
    hook_of_combine()
    refusals(problems, "hook of a combine called twice", hook_of_combine)
    before_forgetting(0)
    older, newer = (buffer.combine(**good_combine(torch, rank.device, handle), return_recv_hook=True)[2] for _ in range(2))
    refusals(problems, "the hook of an earlier combine of the same handle", older)
    newer()
    before_forgetting(1)
    *_, forgotten = buffer.dispatch(**arguments)
    problems += run_operation(buffer, rank, group_operation(SHAPE, Payload.FP8, "exact", 3), Options(Payload.FP8))
    refusals(problems, "a hook that was forgotten", forgotten)
    before_forgetting(2)
    *_, older = buffer.dispatch(**arguments)
    *_, newer = buffer.dispatch(**arguments)
    refusals(problems, "the hook of an earlier dispatch of the same shape", older)
    newer()
    buffer.barrier()
    problems += run_operation(buffer, rank, group_operation(SHAPE, Payload.BF16, "exact", 4), Options(style="hook"))
    buffer.destroy()
    return problems


def test_hooks_out_of_turn(ranks_of):
    no_problems(ranks_of(2).run(hooks_out_of_turn))


def before_memory(rank):
    """Calls that need memory before there is any."""
    import nixl_ep
    import torch

    buffer = nixl_ep.Buffer(
        rank=rank.rank, explicitly_destroy=True, tcp_store_group=rank.store(), device=rank.device, combine="exact"
    )
    problems = []
    for name, call in {
        "dispatch": lambda: buffer.dispatch(**good_dispatch(torch, rank.device)),
        "connect": lambda: buffer.connect_ranks([0, 1]),
        "barrier": lambda: buffer.barrier(),
        "mask": lambda: buffer.update_mask_buffer(1, True),
        "rank beyond": lambda: buffer.update_memory_buffers(rank.rank, 2, 1 << 20),
        "no experts": lambda: buffer.update_memory_buffers(2, 0, 1 << 20),
        "bytes not of 128": lambda: buffer.update_memory_buffers(2, 2, (1 << 20) + 1),
        "negative bytes": lambda: buffer.update_memory_buffers(2, 2, -128),
    }.items():
        refusals(problems, f"{name} before memory", call)
    buffer.update_memory_buffers(2, 2, 1 << 22)
    buffer.connect_ranks([0, 1])
    problems += run_operation(buffer, rank, group_operation(SHAPE, Payload.BF16, "exact", 1), Options())
    buffer.destroy()
    return problems


def test_use_before_memory(ranks_of):
    no_problems(ranks_of(2).run(before_memory))


def too_small(rank):
    """EP-21: memory of another shape is refused before anything is sent."""
    import nixl_ep

    buffer = nixl_ep.Buffer(
        rank=rank.rank, explicitly_destroy=True, tcp_store_group=rank.store(), device=rank.device, combine="exact"
    )
    buffer.update_memory_buffers(2, 2, nixl_ep.Buffer.get_rdma_size_hint(2, 128, 2, 4))
    buffer.connect_ranks([0, 1])
    problems = []
    big = group_operation(Shape(ranks=2, max_tokens=256, hidden=4096), Payload.BF16, "exact", 1, "empty")
    refusals(problems, "larger than the memory", lambda: run_operation(buffer, rank, big, Options()))
    small = group_operation(Shape(ranks=2, max_tokens=2, hidden=128), Payload.BF16, "exact", 1)
    problems += run_operation(buffer, rank, small, Options())
    buffer.destroy()
    return problems


def test_memory_too_small(ranks_of):
    no_problems(ranks_of(2).run(too_small))


def endless_timeout(rank, timeout_ms):
    """The limit in nanoseconds does not fit 64 bits: it must not turn into one that has passed."""
    import time

    import torch

    buffer = open_buffer(rank, SHAPE, timeout_ms=timeout_ms)
    if rank.rank == 0:
        time.sleep(0.1)  # the wait of the other one
    buffer.barrier()
    if rank.device == "cuda":
        torch.cuda.synchronize()
    problems = [str(fault) for fault in buffer.fault_status()]
    buffer.destroy()
    return problems


@pytest.mark.parametrize("timeout_ms", [10**13, 2**63 - 1])
def test_an_endless_timeout(ranks_of, timeout_ms):
    no_problems(ranks_of(2).run(endless_timeout, timeout_ms))


def wrong_numbers(rank):
    """What is no rank, no integer or no dtype is named, and the buffer goes on working."""
    import torch

    buffer = open_buffer(rank, SHAPE)
    whole = good_dispatch(torch, rank.device)
    floating = whole | {"num_max_dispatch_tokens_per_rank": float(TOKENS)}
    problems = []
    for text, call in {
        "remote_ranks is ['a']; a rank or a list of ranks": lambda: buffer.connect_ranks(["a"]),
        "rank_to_mask is 1.5; a rank or a list of ranks": lambda: buffer.update_mask_buffer(1.5),
        f"num_max_dispatch_tokens_per_rank is {TOKENS}.0; an integer is needed": lambda: buffer.dispatch(**floating),
        "num_experts is '4'; an integer is needed": lambda: buffer.dispatch(**whole | {"num_experts": "4"}),
        "top-k is 0; 1 to 32 are allowed": lambda: buffer.dispatch(**whole | {"topk_idx": whole["topk_idx"][:, :0]}),
        "rank_to_mask is 1099511627776; it does not fit 32 bits": lambda: buffer.update_mask_buffer(1 << 40),
        "num_ranks is 'a'; an integer is needed": lambda: buffer.update_memory_buffers("a", 2, 1 << 20),
        "dtype is None; a torch dtype is needed": lambda: buffer.get_local_buffer_tensor(None),
        "size is 5; a sequence of extents is needed": lambda: buffer.get_local_buffer_tensor(torch.int8, 5),
        "size is [-1]; extents from 0 are allowed": lambda: buffer.get_local_buffer_tensor(torch.int8, [-1]),
        "store is a NoneType without": lambda: buffer.agree_mask(None),
    }.items():
        try:
            call()
            problems.append(f"{text}: nothing was raised")
        except (TypeError, RuntimeError) as error:
            if text not in str(error):
                problems.append(f"{text}: it says {error}")
    problems += run_operation(buffer, rank, group_operation(SHAPE, Payload.BF16, "exact", 1), Options())
    buffer.destroy()
    return problems


def test_wrong_numbers(ranks_of):
    no_problems(ranks_of(2).run(wrong_numbers))


def sums_of_two_kinds(rank, modes, hooks):
    """One rank sums exactly, the other one reduces: each masks the other and is told what to do, and nothing wrong is added up."""
    import torch

    buffer = open_buffer(rank, SHAPE, modes[rank.rank])
    x = torch.full((TOKENS, HIDDEN), rank.rank + 1.0).to(torch.bfloat16)
    ids = torch.tensor([[2 * rank.rank, 2 * (1 - rank.rank)] + [-1] * (TOPK - 2)] * TOKENS)
    weights = torch.full((TOKENS, TOPK), 0.5)
    recv_x, _, handle, _, _ = buffer.dispatch(x, ids, TOKENS, use_fp8=False)
    out, _, hook = buffer.combine(recv_x, ids, weights, handle, return_recv_hook=hooks[rank.rank])
    if hook is not None:
        hook()
    told = ""
    try:
        buffer.barrier()
    except RuntimeError as error:
        told = str(error)
    half = torch.equal(out, x / 2)  # what this rank's own expert holds
    masked = buffer.active_ranks()[1] == [rank.rank]
    buffer.destroy()
    return told, half and masked


@pytest.mark.parametrize(("modes", "hooks"), [(("exact", "reduced"), (False, False)), (("reduced", "reduced"), (True, False))], ids=str)
def test_ranks_that_sum_in_different_ways(ranks_of, modes, hooks):
    group = ranks_of(2)
    if group.device == "cuda":
        pytest.skip("on CUDA the kinds of sums of ranks are not compared")
    results = group.run(sums_of_two_kinds, modes, hooks)
    assert all(right for _, right in results.values()), results
    told = [text for text, _ in results.values() if text]  # who looked second found its message taken back
    assert told and all("use of hooks and weights at dispatch must be the same on all ranks" in text for text in told), results
    assert any("exact sums" in text and "reduced sums" in text for text in told), results


def test_interpreter_exit_under_daemon_threads():
    """Threads that use a buffer until the process ends do not abort it."""
    code = textwrap.dedent("""
        import threading, time, torch, nixl_ep
        buffer = nixl_ep.Buffer(rank=0, explicitly_destroy=True, device="cpu")
        buffer.update_memory_buffers(1, 1, nixl_ep.Buffer.get_rdma_size_hint(8, 128, 1, 1))
        mask, started = torch.zeros(1, dtype=torch.int32), threading.Barrier(5)
        def poll():
            started.wait()
            while True:
                buffer.query_mask_buffer(mask)
        for _ in range(4):
            threading.Thread(target=poll, daemon=True).start()
        started.wait()
        time.sleep(0.1)
        """)
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
