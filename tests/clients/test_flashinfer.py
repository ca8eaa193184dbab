"""FlashInfer's use of nixl_ep: positional sizes, a capacity above the world, hooks always, `out=`, masks read and cleared by hand."""
import signal
import time

import pytest
import torch
from ep_ranks import RankGroup

WORLD, CAPACITY, LOCAL, HIDDEN, TOKENS, BOUND, TOPK = 4, 8, 2, 512, 16, 32, 2


@pytest.fixture
def ranks():
    with RankGroup(WORLD, environment={"NIXL_EP_DEVICE": "cpu"}) as group:
        yield group


def opened(rank, timeout_ms):
    import nixl_ep

    buffer = nixl_ep.Buffer(rank=rank.rank, low_latency_mode=True, tcp_store_group=rank.store(), timeout_ms=timeout_ms)
    buffer.update_memory_buffers(CAPACITY, LOCAL, nixl_ep.Buffer.get_rdma_size_hint(BOUND, HIDDEN, CAPACITY, CAPACITY * LOCAL))
    buffer.connect_ranks(list(range(WORLD)))
    generator = torch.Generator().manual_seed(rank.rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(WORLD * LOCAL, generator=generator)[:TOPK] for _ in range(TOKENS)]).to(nixl_ep.topk_idx_t)
    weights = torch.rand(TOKENS, TOPK, generator=generator) * 0.5 + 0.25
    return buffer, x, ids, weights


def round_trip(buffer, x, ids, weights, use_fp8=True):
    """Experts give back what they get."""
    received, count, handle, _, hook = buffer.low_latency_dispatch(x, ids, BOUND, CAPACITY * LOCAL, use_fp8=use_fp8, return_recv_hook=True)
    hook()
    if use_fp8:
        data, scale = received
        y = (data.float() * scale.repeat_interleave(128, dim=-1)).bfloat16()
    else:
        y = received
    out = torch.empty_like(x)
    _, _, hook = buffer.low_latency_combine(y.contiguous(), ids, weights, handle, return_recv_hook=True, out=out)
    hook()
    return out


def expected(x, ids, weights, alive):
    owner = ids.long() // LOCAL
    kept = torch.tensor([owner_rank in alive for owner_rank in owner.flatten().tolist()]).view(owner.shape)
    return x.float() * (weights * kept).sum(dim=1, keepdim=True)


def off_by(out, want):
    """Absolute below 1, relative above."""
    return float(((out.float() - want).abs() / want.abs().clamp(min=1)).max())


def alive_of(buffer):
    raw = torch.empty(CAPACITY, dtype=torch.int32)
    buffer.query_mask_buffer(raw)
    return [rank for rank in range(WORLD) if raw[rank] == 0]


def identity(rank):
    buffer, x, ids, weights = opened(rank, 30_000)
    off = {fp8: max(off_by(round_trip(buffer, x, ids, weights, fp8), expected(x, ids, weights, range(WORLD))) for _ in range(3))
           for fp8 in (True, False)}
    with pytest.raises(AssertionError):
        buffer.destroy()  # without explicitly_destroy
    rank.meet("end", range(WORLD))
    return off, alive_of(buffer)


def test_identity_round_trip(ranks):
    for off, alive in ranks.run(identity).values():
        assert off[False] < 5e-2 and off[True] < 8e-2 and alive == list(range(WORLD))  # FP8 itself rounds by up to 1/16


def stalled(rank):
    """Rank 2 stalls twice the timeout: the others go on without it, later all take each other back."""
    buffer, x, ids, weights = opened(rank, 1000)
    round_trip(buffer, x, ids, weights)
    rank.meet("stall", range(WORLD))
    if rank.rank == 2:
        time.sleep(2)
    else:
        round_trip(buffer, x, ids, weights)  # notices
        assert alive_of(buffer) == [0, 1, 3]
        assert off_by(round_trip(buffer, x, ids, weights), expected(x, ids, weights, {0, 1, 3})) < 8e-2
    rank.meet("again", range(WORLD))
    buffer.clean_mask_buffer()
    for absent in range(WORLD, CAPACITY):
        buffer.update_mask_buffer(absent, mask=True)
    rank.meet("cleared", range(WORLD))
    off = off_by(round_trip(buffer, x, ids, weights), expected(x, ids, weights, range(WORLD)))
    rank.meet("end", range(WORLD))
    return off, alive_of(buffer)


def test_a_stalled_rank_is_left_out_and_taken_back(ranks):
    for off, alive in ranks.run(stalled, timeout=90).values():
        assert off < 8e-2 and alive == list(range(WORLD))


def serve(rank, rounds):
    buffer, x, ids, weights = opened(rank, 500)
    for turn in range(rounds):
        rank.progress[rank.rank] = turn
        round_trip(buffer, x, ids, weights)
        alive = alive_of(buffer)
        if len(alive) < WORLD:
            break
    out = round_trip(buffer, x, ids, weights)
    return off_by(out, expected(x, ids, weights, set(alive))), alive


def test_survivors_of_a_terminated_rank(ranks):
    pending = ranks.start(serve, 100_000)
    end = time.monotonic() + 60
    while min(ranks.progress) < 20:
        assert time.monotonic() < end
        time.sleep(0.01)
    ranks.signal(2, signal.SIGTERM)
    pending.forget(2)
    results = pending.wait(60)
    assert sorted(results) == [0, 1, 3]
    for off, alive in results.values():
        assert off < 8e-2 and alive == [0, 1, 3]
