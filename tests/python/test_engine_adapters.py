"""The adapters for vLLM and SGLang with real rank processes, real stores and the tiny model, on the CPU path."""
import argparse
import os
import pathlib
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "integrations"))
pytest.importorskip("nixl_ep._native", reason="the nixl_ep package is not built")

from engine_groups import Group, coordinator  # noqa: E402
from ep_ranks import RankGroup  # noqa: E402
from nixl_integrations import fault_loop, sglang_ep, tcp_store, tiny_moe, vllm_ep  # noqa: E402

pytestmark = pytest.mark.timeout(240)
HIDDEN, TOKENS, BOUND = 256, 24, 32
LARGE = [8] if os.environ.get("NIXL_TEST_ALL") == "1" else []
CPU = {"NIXL_EP_DEVICE": "cpu", "NIXL_EP_CONNECT_TIMEOUT_MS": "30000"}


@pytest.fixture(scope="module")
def weights():
    return tiny_moe.make_weights(HIDDEN)


@pytest.fixture
def ranks_of():
    made = []

    def get(size, **environment):
        made.append(RankGroup(size, environment={**CPU, **environment}))
        return made[-1]

    yield get
    for group in made:
        group.close()


def agrees(rank, weights, out, trace, fp8):
    """Compares one rank's decoding with what one process computes from the same prompts."""
    reference = tiny_moe.LocalExperts(weights)
    expected, sure = tiny_moe.decode(weights, reference, tiny_moe.prompts(rank, TOKENS), out.shape[1])
    clear = (sure > (0.5 if fp8 else 0.05)).cumprod(dim=1).bool()  # up to the first close call the tokens must be the same
    assert clear[:, 0].any() and torch.equal(out[clear], expected[clear])
    for layer, x, ids, scales, y in trace:
        assert tiny_moe.calc_diff(y, reference(layer, x, ids, scales)) < (1e-3 if fp8 else 1e-5)
    return int(clear.sum())


# ---- vLLM

def kwargs(size, local, **more):
    return {"max_num_tokens_per_dp_rank": BOUND, "token_hidden_size": HIDDEN, "num_global_experts": size * local, "num_ep_ranks": size, **more}


def manager_of(rank, size, prefix):
    manager = vllm_ep.NixlEPAll2AllManager(Group(rank.rank, size), coordinator(rank.store(prefix)))
    return manager


def vllm_decode(rank, manager, size, local, fp8=False, num_steps=4):
    weights = rank.state.setdefault("weights", tiny_moe.make_weights(HIDDEN))
    buffer = manager.get_handle(kwargs(size, local))
    capacity = buffer.group_size * local
    pf = vllm_ep.NixlEPPrepareAndFinalize(buffer, BOUND, buffer.group_size, use_fp8_dispatch=fp8)
    experts = tiny_moe.VllmExperts(weights, rank.rank, tiny_moe.Placement(size, local=local), pf, capacity, fp8)
    trace = []
    out, _ = tiny_moe.decode(weights, experts, tiny_moe.prompts(rank.rank, TOKENS), num_steps, trace)
    return agrees(rank.rank, weights, out, trace, fp8)


def vllm_serve(rank, size, local, fp8, num_steps):
    manager = manager_of(rank, size, f"vllm{rank.call}")
    before = vllm_decode(rank, manager, size, local, fp8, num_steps)
    buffer, steps = manager.get_handle(kwargs(size, local)), iter(range(4))
    watch = vllm_ep.MaskWatch(buffer, size)
    if size == 4 and rank.rank != 3:
        buffer.update_mask_buffer(3, True)
        assert watch.changed() == [3] and watch.changed() == []
    vllm_ep.recover(buffer, lambda: rank.meet(f"recovery{next(steps)}", range(size)))
    assert watch.changed() == ([3] if size == 4 and rank.rank != 3 else [])
    return min(before, vllm_decode(rank, manager, size, local, fp8, 2))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, *LARGE])
def test_vllm_decodes_like_one_process(ranks_of, size, fp8):
    local = -(-20 // size)
    results = ranks_of(size, VLLM_NIXL_EP_MAX_NUM_RANKS=str(size)).run(vllm_serve, size, local, fp8, 64 if size == 2 else 6, timeout=120)
    assert all(count > 0 for count in results.values())


def vllm_resizes(rank, sizes, local, staged):
    """A phase for every size; ranks beyond it stay away. Before a resize all that are in either size meet, as engines do."""
    done = []
    for phase, size in enumerate(sizes):
        before = sizes[phase - 1] if phase else 0
        if rank.rank >= max(size, before):
            continue
        rank.meet(f"phase{phase}", range(max(size, before)))
        cls = vllm_ep.NixlEPAll2AllManager
        if rank.rank >= size:  # a leaver stops; its process may come back later
            cls._buffer = cls._sizes = None
            continue
        manager = manager_of(rank, size, f"resize{phase}")
        if staged and cls._buffer is not None:
            buffer = manager.get_handle(kwargs(size, local, stage=True))
            assert cls._buffer.ep_size == before and buffer is cls._buffer[0]
            rank.meet(f"staged{phase}", range(min(size, before)))
            manager.commit_staged_state()
            assert cls._buffer[1] == size
        elif staged:  # a newcomer is wired by the others before they commit
            manager.get_handle(kwargs(size, local))
        rank.meet(f"ready{phase}", range(size))
        done.append(vllm_decode(rank, manager, size, local))
        manager.destroy()
    return done


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("sizes", [(2, 4, 2), (2, 3, 2)])
def test_vllm_grows_and_shrinks(ranks_of, sizes, staged):
    results = ranks_of(max(sizes), VLLM_NIXL_EP_MAX_NUM_RANKS="4").run(vllm_resizes, sizes, 10, staged, timeout=120)
    assert [len(results[rank]) for rank in range(2)] == [3, 3] and all(results[rank] for rank in range(max(sizes)))


def held():
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task"))


def vllm_many_resizes(rank, rounds):
    seen = []
    for turn in range(rounds):
        vllm_resizes_of(rank, turn)
        seen.append(held())
    return seen


def vllm_resizes_of(rank, turn):
    for phase, size in enumerate((1, 2)):
        rank.meet(f"{turn}.{phase}", range(2))
        if rank.rank >= size:
            vllm_ep.NixlEPAll2AllManager._buffer = None
            continue
        manager = vllm_ep.NixlEPAll2AllManager(Group(rank.rank, size), coordinator(rank.state.setdefault("store", rank.store("many"))))
        vllm_decode(rank, manager, size, 20, num_steps=1)
        manager.destroy()


def test_vllm_twenty_resizes_hold_nothing_back(ranks_of):
    results = ranks_of(2, VLLM_NIXL_EP_MAX_NUM_RANKS="2").run(vllm_many_resizes, 10, timeout=120)
    for seen in results.values():
        assert len({one for one in seen[2:]}) == 1, seen


def vllm_threads(rank):
    cls = vllm_ep.NixlEPAll2AllManager
    managers = [manager_of(rank, 1, "threads") for _ in range(16)]
    start, got = threading.Barrier(16), []

    def enter(manager):
        start.wait()
        got.append(manager.get_handle(kwargs(1, 4)))

    threads = [threading.Thread(target=enter, args=(one,)) for one in managers]
    [one.start() for one in threads]
    [one.join() for one in threads]
    assert len(got) == 16 and len({id(one) for one in got}) == 1 and cls._buffer == (got[0], 1)
    manager = managers[0]
    for call in (manager.dispatch, manager.combine):
        with pytest.raises(NotImplementedError):
            call()
    assert manager.max_sms_used() == 0
    return True


def test_vllm_sixteen_threads_make_one_buffer(ranks_of):
    assert ranks_of(1).run(vllm_threads) == {0: True}


def test_vllm_quantises_what_travelled_plain():
    received, count = torch.randn(2, 4, 128).bfloat16(), torch.tensor([4, 1], dtype=torch.int32)
    received[1, 1:] = float("nan")
    for dtype, bound in ((torch.float8_e4m3fn, 0.07), (torch.int8, 0.01)):
        got = vllm_ep.NixlEPPrepareAndFinalize._received(received, count, SimpleNamespace(quant_dtype=dtype, per_act_token_quant=True), False)
        back = got.expert_x.float() * got.expert_x_scale
        for expert, rows in enumerate(count.tolist()):
            valid = received[expert, :rows].float()
            assert ((back[expert, :rows] - valid).abs() <= bound * valid.abs().amax(dim=-1, keepdim=True)).all()
    assert vllm_ep.NixlEPPrepareAndFinalize.maybe_roundup_layer_hidden_size(2100) == 2176


# ---- SGLang

def sglang_open(rank, size, local, tag, **settings):
    tcp_store.set_global_tcp_store(rank.store(tag))
    sglang_ep.NixlEPBuffer.configure(**settings)
    sglang_ep.NixlEPBuffer._buffer = None
    return sglang_ep.NixlEPDispatcher(Group(rank.rank, size), size * local, local, HIDDEN, return_recv_hook=rank.call % 2 == 0)


def sglang_serve(rank, size, num_steps):
    weights, placement = tiny_moe.make_weights(HIDDEN), tiny_moe.Placement(size)
    dispatcher = sglang_open(rank, size, placement.local, f"sglang{rank.call}")
    trace = []
    experts = tiny_moe.SglangExperts(weights, rank.rank, placement, dispatcher)
    out, _ = tiny_moe.decode(weights, experts, tiny_moe.prompts(rank.rank, TOKENS), num_steps, trace)
    fp8 = os.environ.get("SGLANG_NIXL_EP_BF16_DISPATCH") != "1"
    return agrees(rank.rank, weights, out, trace, fp8)


@pytest.mark.parametrize("bf16", ["0", "1"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, *LARGE])
def test_sglang_decodes_like_one_process(ranks_of, size, bf16):
    group = ranks_of(size, SGLANG_NIXL_EP_BF16_DISPATCH=bf16, SGLANG_NIXL_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=str(BOUND))
    for num_steps in (6, 2):  # with hooks, with events
        assert all(group.run(sglang_serve, size, num_steps, timeout=120).values())


def sglang_two_batches(rank, size):
    """Two dispatchers interleaved give the same as one after the other; a wrong order is refused."""
    weights, placement = tiny_moe.make_weights(HIDDEN), tiny_moe.Placement(size)
    one = sglang_open(rank, size, placement.local, "two")
    two = sglang_ep.NixlEPDispatcher(Group(rank.rank, size), size * placement.local, placement.local, HIDDEN, return_recv_hook=True)
    one._impl.return_recv_hook = True
    batches = [tiny_moe.normed(weights.embedding[tiny_moe.prompts(rank.rank + 10 * i, TOKENS)]) for i in range(2)]
    routed = [tiny_moe.route(weights, 0, x) for x in batches]
    ids = [placement.physical(0, i) for i, _ in routed]
    logical = placement.logical_at(0, rank.rank)

    def experts_of(got):
        y = tiny_moe.run_experts(weights, 0, logical, got.hidden_states, got.masked_m, got.hidden_states_scale)
        return y

    def combine_input(got, y):
        return sglang_ep.NixlEPCombineInput(y, got.topk_ids, got.topk_weights)

    plain = []
    for i in range(2):
        got = one.dispatch(batches[i], ids[i], routed[i][1])
        assert got.expected_m >= 1 and got.hidden_states_scale is not None
        plain.append(one.combine(combine_input(got, experts_of(got))))
    with pytest.raises(AssertionError, match="INITIAL"):
        one.dispatch_b()
    with pytest.raises(AssertionError):
        one.combine_a(None)
    one.dispatch_a(batches[0], ids[0], routed[0][1])
    with pytest.raises(AssertionError, match="AFTER_DISPATCH_A"):
        one.dispatch_a(batches[0], ids[0], routed[0][1])
    first = one.dispatch_b()
    y0 = experts_of(first)
    two.dispatch_a(batches[1], ids[1], routed[1][1])
    second = two.dispatch_b()
    one.combine_a(combine_input(first, y0))
    y1 = experts_of(second)
    out0 = one.combine_b()
    two.combine_a(combine_input(second, y1))
    out1 = two.combine_b()
    return torch.equal(out0, plain[0]) and torch.equal(out1, plain[1])


def test_sglang_two_batch_overlap(ranks_of):
    assert ranks_of(2, SGLANG_NIXL_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=str(BOUND)).run(sglang_two_batches, 2) == {0: True, 1: True}


def sglang_grow(rank, join):
    """Ranks 0 and 1 begin; 2 and 3 join as a group of their own; the first two connect to them at their next dispatch."""
    weights, local = tiny_moe.make_weights(HIDDEN), 10
    group_rank, size, offset = (rank.rank, 2, 0) if rank.rank < 2 else (rank.rank - 2, 2, 2)
    rank = SimpleNamespace(rank=group_rank, call=2, store=rank.store, number=rank.rank, meet=rank.meet)
    counts = []

    def serve(num_ranks, dispatcher):
        trace = []
        experts = tiny_moe.SglangExperts(weights, rank.number, tiny_moe.Placement(num_ranks, local=local), dispatcher)
        out, _ = tiny_moe.decode(weights, experts, tiny_moe.prompts(rank.number, TOKENS), 3, trace)
        counts.append(agrees(rank.number, weights, out, trace, True))

    if offset == 0:
        dispatcher = sglang_open(rank, size, local, "grow", max_ep_size=4)
        serve(2, dispatcher)
    rank.meet("joining", range(4))
    if offset == 0:
        sglang_ep.NixlEPBuffer.set_world_size(4)
    else:
        dispatcher = sglang_open(rank, size, local, "grow", max_ep_size=4, ep_join_rank_offset=2)
    serve(4, dispatcher)
    rank.meet("leaving", range(4))
    if offset == 0:
        sglang_ep.NixlEPBuffer.set_world_size(2)
        serve(2, dispatcher)
    return counts


def test_sglang_joiners_and_leavers(ranks_of):
    results = ranks_of(4, SGLANG_NIXL_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=str(BOUND)).run(sglang_grow, True, timeout=120)
    assert [len(results[rank]) for rank in range(4)] == [3, 3, 1, 1]


def sglang_survive(rank, size, num_steps):
    """Serves through the loss of a rank: the step is run again with the experts placed on the others."""
    import nixl_ep

    class Impatient(nixl_ep.Buffer):
        def __init__(self, *args, **more):
            super().__init__(*args, timeout_ms=1000, **more)

    nixl_ep.Buffer = Impatient
    weights = tiny_moe.make_weights(HIDDEN)
    sglang_ep.ElasticEPStateManager.reset()
    state = sglang_ep.ElasticEPStateManager.init(size)
    placement = tiny_moe.Placement(size, local=8)
    dispatcher = sglang_open(rank, size, placement.local, "survive")
    buffer = dispatcher._impl._buffer()
    experts = tiny_moe.SglangExperts(weights, rank.rank, placement, dispatcher)
    lost = []

    def on_loss(ranks):
        lost.extend(ranks)
        state.active_ranks[ranks] = 0
        experts.placement = tiny_moe.Placement(size, local=8)

    loop = fault_loop.FaultLoop(buffer, state.active_ranks, on_loss)
    experts.around = loop.step
    reference = tiny_moe.LocalExperts(weights)
    tokens = tiny_moe.prompts(rank.rank, TOKENS)
    worst = 0.0
    for step in range(num_steps):
        rank.progress[rank.rank] = step
        inner = tiny_moe.normed(weights.embedding[tokens] + weights.position[step % tiny_moe.POSITIONS])
        ids, scales = tiny_moe.route(weights, 0, inner)
        mine = experts(0, inner, ids, scales)
        worst = max(worst, tiny_moe.calc_diff(mine, reference(0, inner, ids, scales)))
    return sorted(lost), worst, state.active_ranks.tolist()


def test_sglang_survives_a_killed_rank(ranks_of, monkeypatch):
    group = ranks_of(4, SGLANG_NIXL_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=str(BOUND), SGLANG_NIXL_EP_BF16_DISPATCH="1")
    pending = group.start(sglang_survive, 4, 400)
    deadline = time.monotonic() + 60
    while min(group.progress) < 40:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    group.kill(2)
    pending.forget(2)
    results = pending.wait(150)
    assert sorted(results) == [0, 1, 3]
    for lost, worst, active in results.values():
        assert lost == [2] and worst < 1e-5 and active == [1, 1, 0, 1]


def test_sglang_arguments(monkeypatch, caplog):
    args = sglang_ep.add_cli_args(argparse.ArgumentParser()).parse_args(
        "--moe-a2a-backend nixl --elastic-ep-backend nixl --enable-eplb --ep-num-redundant-experts 24 --deepep-mode low_latency".split())
    args.tp_size, args.ep_size, args.pp_size = 8, 1, 1
    assert sglang_ep.resolve_server_args(args) is args
    assert args.ep_size == 8 and args.eplb_algorithm == "elasticity_aware" and "ep_size" in caplog.text
    for change in ({"eplb_algorithm": "deepseek"}, {"pp_size": 2}):
        with pytest.raises(AssertionError):
            sglang_ep.resolve_server_args(argparse.Namespace(**{**vars(args), **change}))
    mixed = argparse.Namespace(**{**vars(args), "elastic_ep_backend": "mooncake", "eplb_algorithm": "elasticity_aware_hierarchical"})
    assert sglang_ep.resolve_server_args(mixed).eplb_algorithm == "elasticity_aware_hierarchical"
    off = argparse.Namespace(moe_a2a_backend="deepep", tp_size=8, ep_size=4, elastic_ep_backend=None, eplb_algorithm="deepseek")
    assert sglang_ep.resolve_server_args(off).ep_size == 4 and sglang_ep.set_up_store(off, 0, 1) is None
    assert sglang_ep.MoeA2ABackend("nixl").is_nixl() and not sglang_ep.MoeA2ABackend.DEEPEP.is_nixl()
    for mode in ("normal", "auto"):
        with pytest.raises(NotImplementedError, match="Normal mode is not supported for Nixl EP yet."):
            sglang_ep.NixlEPDispatcher(Group(0, 1), 4, 4, HIDDEN, deepep_mode=sglang_ep.DeepEPMode(mode))
    monkeypatch.setenv("SGLANG_NIXL_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK", "1025")
    with pytest.raises(AssertionError, match="1024"):
        sglang_ep.NixlEPDispatcher(Group(0, 1), 4, 4, HIDDEN)
    monkeypatch.delenv("SGLANG_NIXL_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK")
    monkeypatch.setattr(tcp_store, "_store", None)
    monkeypatch.setattr(sglang_ep.NixlEPBuffer, "_buffer", None)
    with pytest.raises(RuntimeError, match="create_global_tcp_store"):
        sglang_ep.NixlEPBuffer.get_nixl_buffer(Group(0, 1), HIDDEN, "low_latency", BOUND, 4, 4)
    monkeypatch.setitem(sys.modules, "nixl_ep", None)
    with pytest.raises((ImportError, ValueError)):
        sglang_ep.NixlEPDispatcher(Group(0, 1), 4, 4, HIDDEN)


def test_sglang_command_line():
    """The whole line of the document, on a parser of our own and on one that has the engine's flags already."""
    line = ("--moe-a2a-backend nixl --elastic-ep-backend nixl --eplb-algorithm elasticity_aware_hierarchical --deepep-mode low_latency "
            "--enable-eplb --ep-num-redundant-experts 24 --tp 8 --dp 8 --enable-dp-attention").split()
    engine = argparse.ArgumentParser()
    engine.add_argument("--tensor-parallel-size", "--tp-size", "--tp", dest="tp_size", type=int, default=1)
    engine.add_argument("--moe-a2a-backend", choices=["none", "deepep"], default="none")
    for parser in (argparse.ArgumentParser(), engine):
        args = sglang_ep.resolve_server_args(sglang_ep.add_cli_args(parser).parse_args(line))
        assert (args.tp_size, args.dp_size, args.ep_size, args.pp_size, args.enable_dp_attention) == (8, 8, 8, 1, True)
        assert (args.moe_a2a_backend, args.elastic_ep_backend, args.ep_num_redundant_experts) == ("nixl", "nixl", 24)
        assert args.eplb_algorithm == "elasticity_aware_hierarchical" and args.enable_eplb
        defaults = sglang_ep.resolve_server_args(sglang_ep.add_cli_args(parser).parse_args([]))
        assert (defaults.moe_a2a_backend, defaults.tp_size, defaults.ep_size, defaults.eplb_algorithm) == ("none", 1, 1, "auto")
    with pytest.raises(SystemExit):
        engine.parse_args(["--moe-a2a-backend", "carrier-pigeon"])


# ---- the store

def test_global_store(monkeypatch):
    monkeypatch.setattr(tcp_store, "_store", None)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        monkeypatch.setenv("SGLANG_TCP_STORE_PORT", str(busy.getsockname()[1]))
        with pytest.raises(RuntimeError, match=f"{busy.getsockname()[1]}.*SGLANG_TCP_STORE_PORT"):
            tcp_store.create_global_tcp_store(0, 2)
        assert tcp_store.get_global_tcp_store() is None
    store = tcp_store.create_global_tcp_store(0, 2)
    assert tcp_store.create_global_tcp_store(0, 2) is store is tcp_store.get_global_tcp_store()
    store.set("a", "b")
    tcp_store.set_global_tcp_store(None)
    client = tcp_store.create_global_tcp_store(1, 2)  # a joiner: client only
    assert client is not store and client.get("a") == b"b"
    tcp_store.set_global_tcp_store(None)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(RuntimeError, match="MASTER_ADDR"):
        tcp_store.create_global_tcp_store(0, 2)


# ---- looking once in a while

class Marks:
    """The mask calls of a buffer, kept in memory."""

    group_size = 5

    def __init__(self):
        self.mask = [0, 0, 0, 0, -1]

    def fault_tensor(self):
        return torch.zeros(5, dtype=torch.int32)

    def query_mask_buffer(self, out):
        out.copy_(torch.tensor(self.mask, dtype=torch.int32))

    def update_mask_buffer(self, rank, mask):
        self.mask[rank] = int(mask)


def test_marks_are_trusted_late_and_from_a_minority():
    now, buffer, gone = [100.0], Marks(), {1}
    poller = fault_loop.MarkPoller(buffer, 4, lambda rank: rank not in gone, clock=lambda: now[0])
    buffer.mask[1] = buffer.mask[2] = 1
    now[0] += 2
    assert poller.poll() == []  # the group has just been made
    now[0] += 30
    assert poller.poll() == [1] and buffer.mask == [0, 1, 0, 0, -1]  # rank 2 answers elsewhere: a false mark
    assert poller.poll() == []  # not a second later
    gone.add(2)
    buffer.mask[2] = 1
    now[0] += 1
    assert poller.poll() == []  # half of the ranks: it may be we who are cut off
    poller.resized(5)
    now[0] += 29
    assert poller.poll() == []
    now[0] += 2
    assert poller.poll() == [1, 2]


def test_active_ranks_are_zero_or_one():
    active = torch.empty(5, dtype=torch.int32)
    buffer = Marks()
    buffer.mask[3] = 1
    fault_loop.refresh_active_ranks(buffer, torch.empty(5, dtype=torch.int32), active)
    assert active.tolist() == [1, 1, 1, 0, 0]


