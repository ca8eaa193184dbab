"""KV-cache transfer between real processes: the example in all its shapes, peers that die, many blocks, blocks returned."""

import json
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import zlib

import numpy
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "integrations"))
pytest.importorskip("nixl._native", reason="the nixl package is not built")

from nixl_integrations.kv_layout import Side, Units  # noqa: E402
from nixl_integrations.kv_transfer import (  # noqa: E402
    BlockPool, KVCache, KVPeerLost, KVReceiver, KVSender, KVTimeout, KVTransferError)

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("flags", [
    "--prefill_tp 1 --decode_tp 1",
    "--prefill_tp 2 --decode_tp 1",
    "--prefill_tp 1 --decode_tp 2 --pull",
    "--prefill_tp 2 --decode_tp 1 --prefill_page 16 --decode_page 24 --tokens 333",
    "--prefill_tp 1 --decode_tp 2 --prefill_page 32 --decode_page 8 --pull --tokens 77",
])
def test_example(flags):
    command = [sys.executable, ROOT / "examples/python/kv_transfer.py", *flags.split(), "--layers", "3", "--requests", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout and done.stdout.count("complete and verified") >= 2


def about(heads, page, rank=0, size=1, blocks=10, bases=(0, 1 << 30)):
    return {"bases": list(bases), "blocks": blocks, "heads": heads, "page": page, "token_bytes": 32, "kind": "DRAM", "device": 0,
            "tp_rank": rank, "tp_size": size}


@pytest.mark.parametrize("ours, theirs", [
    (about(8, 16), about(8, 16)), (about(8, 16), about(2, 16, 3, 4)), (about(4, 16, 1, 2), about(8, 24)),
    (about(8, 8), about(4, 32, 1, 2)), (about(2, 12, 1, 4), about(4, 18, 0, 2)),
])
def test_units_pair_the_same_tokens_of_the_same_heads(ours, theirs):
    """Every unit, resolved to (layer, plane, head, token) on both sides, names the same bytes; all shared ones appear once."""
    sides, tokens = [Side(ours), Side(theirs)], 70
    units = Units(*sides)
    count = -(-tokens // units.tokens)
    resolved = []
    for side, seed in zip(sides, (1, 2)):
        ids = numpy.random.default_rng(seed).permutation(side.blocks)
        rows, indices = side.rows(units), side.indices(units, ids, 0, count)
        place_of = {int(block): place for place, block in enumerate(ids)}
        plane_bytes, names = side.blocks * side.block_bytes, []
        for index in indices:
            address, length, _, stride, blocks = map(int, rows[index // side.blocks])
            start = address + int(index % side.blocks) * stride
            assert blocks == side.blocks and stride == side.block_bytes
            layer = max(i for i, base in enumerate(side.bases) if base <= start)
            plane, inside = divmod(start - side.bases[layer], plane_bytes)
            block, inside = divmod(inside, side.block_bytes)
            head, inside = divmod(inside, side.page * side.token_bytes)
            token = place_of[block] * side.page + inside // side.token_bytes
            names.append((layer, plane, side.first_head + head, token, length))
        resolved.append(names)
    assert resolved[0] == resolved[1]
    shared = set(sides[0].head_range()) & set(sides[1].head_range())
    assert len(set(resolved[0])) == len(resolved[0])
    covered = sum(length for *_, length in resolved[0])
    assert covered == 2 * 2 * len(shared) * count * units.tokens * 32


def make_agent(name):
    import nixl

    return nixl.nixl_agent(name, nixl.nixl_agent_config(backends=["UCX"]))


def make_layers(blocks, layers=2, heads=2, page=4, dim=8):
    return [numpy.zeros((2, blocks, heads, page, dim), dtype=numpy.uint16) for _ in range(layers)]


def child_receiver(pipe, blocks, shape={}):
    cache = KVCache(make_layers(blocks, **shape))
    receiver = KVReceiver(make_agent("decode"), cache, BlockPool(blocks))
    pipe.send(receiver.card())
    receiver.connect(pipe.recv())
    receiver.open("r", numpy.arange(blocks), blocks * cache.page)
    pipe.send("open")
    pipe.recv()  # until killed


def child_sender(pipe, blocks):
    sender = KVSender(make_agent("prefill"), KVCache(make_layers(blocks)), BlockPool(blocks))
    pipe.send(sender.card())
    sender.connect(pipe.recv())
    pipe.send("connected")
    if pipe.recv() == "give up":
        while "r" not in sender.opened():
            time.sleep(0.001)
        sender.give_up("r")
        pipe.send("given up")
    pipe.recv()


class Child:
    def __init__(self, body, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=body, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def get(self):
        assert self.pipe.poll(60), "the second process did not answer"
        return self.pipe.recv()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.join(10)


def receiver_of(child, blocks):
    """Our pool and receiver, connected with the sender of the child."""
    pool = BlockPool(blocks)
    receiver = KVReceiver(make_agent("decode"), KVCache(make_layers(blocks)), pool)
    receiver.connect(child.get())
    child.pipe.send(receiver.card())
    assert child.get() == "connected"
    return pool, receiver


@pytest.mark.parametrize("when", ["before", "while waiting to open"])
def test_receiver_killed_gives_the_blocks_back(when):
    blocks = 64
    with Child(child_receiver, blocks) as child:
        pool = BlockPool(blocks)
        sender = KVSender(make_agent("prefill"), KVCache(make_layers(blocks)), pool)
        sender.connect(child.get())
        child.pipe.send(sender.card())
        assert child.get() == "open"
        ids = pool.take(blocks)
        request = "r" if when == "before" else "never opened"
        child.process.kill()
        child.process.join(10)
        with pytest.raises(KVPeerLost):
            sender.push(ids, request, timeout=30).wait(30)
        assert pool.num_free == blocks
        sender.close()


def test_blocks_of_a_push_that_cannot_be_stopped_stay_out_of_the_pool(monkeypatch):
    """A stopped receiver holds a transfer through the network: nobody may write into its source before it has ended."""
    monkeypatch.setenv("NIXL_SAME_HOST", "n")
    blocks, shape = 64, {"heads": 8, "page": 64, "dim": 128}  # 32 MB: more than sockets hold
    with Child(child_receiver, blocks, shape) as child:
        pool = BlockPool(blocks)
        sender = KVSender(make_agent("prefill"), KVCache(make_layers(blocks, **shape)), pool)
        sender.connect(child.get())
        child.pipe.send(sender.card())
        assert child.get() == "open"
        while "r" not in sender.opened():
            time.sleep(0.001)
        os.kill(child.process.pid, signal.SIGSTOP)
        with pytest.raises(KVTimeout):
            sender.push(pool.take(blocks), "r").wait(0.3)
        assert sender.reclaim() == 1 and pool.num_free == 0
        os.kill(child.process.pid, signal.SIGCONT)
        deadline = time.monotonic() + 60
        while sender.reclaim():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert pool.num_free == blocks


def test_sender_killed_is_told_to_the_waiting_receiver():
    blocks = 16
    with Child(child_sender, blocks) as child:
        pool, receiver = receiver_of(child, blocks)
        receiver.open("r", pool.take(blocks), blocks * 4)
        child.process.kill()
        start = time.monotonic()
        with pytest.raises(KVPeerLost, match="prefill"):
            receiver.wait("r", 30)
        assert time.monotonic() - start < 10
        assert pool.num_free == blocks
        receiver.close()


def test_sender_gives_up_and_timeouts_keep_blocks_that_may_still_be_written():
    blocks = 16
    with Child(child_sender, blocks) as child:
        pool, receiver = receiver_of(child, blocks)
        receiver.open("r", pool.take(8), 32)
        with pytest.raises(KVTimeout):
            receiver.wait("r", 0.05)
        assert pool.num_free == 8 and receiver.reclaim() == 1
        child.pipe.send("give up")
        assert child.get() == "given up"
        deadline = time.monotonic() + 20
        while receiver.reclaim():
            receiver.poll_messages()
            assert time.monotonic() < deadline
        assert pool.num_free == blocks
        receiver.close()


def test_a_receiver_that_was_disconnected_gets_nothing():
    pool = BlockPool(8)
    sender = KVSender(make_agent("leaver"), KVCache(make_layers(8)), pool)
    receiver = KVReceiver(make_agent("left"), KVCache(make_layers(8)))
    sender.connect(receiver.card())
    receiver.connect(sender.card())
    receiver.open("r", numpy.arange(8), 32)
    while "r" not in sender.opened():
        time.sleep(0.001)
    sender.disconnect("left")
    with pytest.raises(KVTimeout, match="was not opened by its receivers"):
        sender.push(pool.take(8), "r", timeout=0.05)
    assert pool.num_free == 8
    receiver.close()
    sender.close()


def test_a_hundred_thousand_blocks_in_one_process():
    blocks = 100_000
    source, target = make_layers(blocks, 1, 1, 2, 4), make_layers(blocks, 1, 1, 2, 4)
    for layer in source:
        layer[...] = numpy.random.default_rng(0).integers(0, 1 << 16, layer.shape, dtype=numpy.uint16)
    pool = BlockPool(blocks)
    sender, receiver = KVSender(make_agent("p"), KVCache(source), pool), KVReceiver(make_agent("d"), KVCache(target))
    sender.connect(receiver.card())
    receiver.connect(sender.card())
    ours, theirs = (numpy.random.default_rng(seed).permutation(blocks) for seed in (1, 2))
    pool.take(blocks)
    receiver.open("big", theirs, 2 * blocks)
    sender.push(ours, "big").wait(60)
    assert list(receiver.wait("big", 60)) == list(theirs)
    assert numpy.array_equal(target[0][:, theirs], source[0][:, ours])
    assert pool.num_free == blocks
    for end in (sender, receiver):
        end.close()


def test_damaged_messages_do_no_harm():
    """Nonsense from an agent that both sides know, among the real messages: the request is carried out all the same."""
    source, target = make_layers(8, 1, 1, 2, 4), make_layers(8, 1, 1, 2, 4)
    for layer in source:
        layer[...] = numpy.random.default_rng(0).integers(0, 1 << 16, layer.shape, dtype=numpy.uint16)
    sender, receiver = KVSender(make_agent("p"), KVCache(source)), KVReceiver(make_agent("d"), KVCache(target))
    sender.connect(receiver.card())
    receiver.connect(sender.card())
    points = random.Random(3)
    good = [b'kvopen:{"request": "x", "tokens": 16, "crc": 0}\n' + bytes(64), b"kvread:x", b"kv:x:0:1", b"kvfail:x"]
    for turn in range(400):
        bad = bytearray(points.choice(good))
        for _ in range(points.randint(0, 4)):
            at = points.randrange(len(bad))
            bad[at : at + points.randint(0, 2)] = points.choice([b"", b"\xff", b"-", b"9" * 30, b":", b"{", b"[]", bytes([points.randrange(256)])])
        speaker, hearer = (sender, receiver) if turn % 2 else (receiver, sender)
        speaker.agent.send_notif(hearer.agent.name, bytes(bad or b"?"))
        if turn % 100 == 99:
            request = f"good {turn}"
            ids = numpy.random.default_rng(turn).permutation(8)
            receiver.open(request, ids, 16)
            sender.push(numpy.arange(8), request).wait(30)
            assert list(receiver.wait(request, 30)) == list(ids)
            assert numpy.array_equal(target[0][:, ids], source[0])
    for end in (sender, receiver):
        end.close()


def test_caches_that_do_not_match_are_refused():
    sender = KVSender(make_agent("p"), KVCache(make_layers(4, dim=8)))
    receiver = KVReceiver(make_agent("d"), KVCache(make_layers(4, dim=16)))
    with pytest.raises(ValueError, match="token_bytes"):
        sender.connect(receiver.card())
    with pytest.raises(ValueError, match="2, blocks"):
        KVCache([numpy.zeros((3, 4))])
    with pytest.raises(ValueError, match="tp_rank is 2; 0 to 1 are allowed with tp_size 2"):
        KVCache(make_layers(4), 2, 2)
    with pytest.raises(KVTransferError, match="9 blocks wanted, 4 free"):
        BlockPool(4).take(9)
    with pytest.raises(ValueError, match="3 blocks"):
        receiver.open("r", [0, 1], 12)


def test_blocks_that_a_cache_does_not_have_are_refused():
    """With unequal pages, index block + piece * blocks of a block beyond the end would be a piece of another block."""
    source, target = make_layers(8, page=4), make_layers(4, page=8)
    sender, receiver = KVSender(make_agent("p"), KVCache(source)), KVReceiver(make_agent("d"), KVCache(target))
    sender.connect(receiver.card())
    receiver.connect(sender.card())
    for wrong in (4, -1, 1 << 40):
        with pytest.raises(ValueError, match=f"block {wrong} is not in the cache, which has blocks 0 to 3"):
            receiver.open("r", [wrong], 4)
        with pytest.raises(ValueError, match=f"block {wrong} is not in the cache, which has blocks 0 to 3"):
            receiver.pull("r", [wrong], {"p": [0]}, 4)
    for wrong in ([0.5], [[0]], ["a"]):
        with pytest.raises(ValueError, match="a list of block numbers is needed"):
            receiver.open("r", wrong, 4)
    with pytest.raises(KVTransferError, match="block 8 is not in the cache, which has blocks 0 to 7"):
        receiver.pull("r", [0], {"p": [8]}, 4)
    with pytest.raises(ValueError, match="block 8 is not in the cache"):
        sender.push([8], "r")
    receiver.open("r", [0, 1], 16)
    with pytest.raises(KVTransferError, match="4 blocks of 4 tokens are needed, 3 given"):
        sender.push([0, 1, 2], "r", timeout=30)
    body = numpy.array([4]).tobytes()  # from a receiver that does not look
    head = json.dumps({"request": "x", "tokens": 4, "crc": zlib.crc32(body)}).encode()
    receiver.agent.send_notif("p", b"kvopen:" + head + b"\n" + body)
    with pytest.raises(KVTransferError, match="block 4 is not in the cache"):
        sender.push([0], "x", timeout=30)
    assert not any(layer.any() for layer in target)
    for end in (sender, receiver):
        end.close()


def test_requests_that_could_never_end_are_refused():
    """A request is complete when every head of it has arrived, which needs a sender for each."""
    senders = [KVSender(make_agent(f"p{rank}"), KVCache(make_layers(8, heads=1), rank, 2)) for rank in range(2)]
    receiver = KVReceiver(make_agent("d"), KVCache(make_layers(8)))
    with pytest.raises(ValueError, match=r"no sender of heads \[0, 1\] among \[\]"):
        receiver.open("r", [0], 4)
    receiver.connect(senders[1].card())
    with pytest.raises(ValueError, match=r"no sender of heads \[0\] among \['p1'\]"):
        receiver.open("r", [0], 4)
    receiver.connect(senders[0].card())
    with pytest.raises(ValueError, match=r"no sender of heads \[1\] among \['p0'\]"):
        receiver.pull("r", [0], {"p0": [0]}, 4)
    with pytest.raises(ValueError, match="'p2' is not connected"):
        receiver.pull("r", [0], {"p0": [0], "p1": [0], "p2": [0]}, 4)
    for tokens in (0, -4):
        with pytest.raises(ValueError, match=f"{tokens} tokens; one at least is needed"):
            receiver.open("r", [0], tokens)
        with pytest.raises(ValueError, match=f"{tokens} tokens; one at least is needed"):
            receiver.pull("r", [0], {"p0": [0], "p1": [0]}, tokens)
    for call in (lambda: receiver.open(5, [0], 4), lambda: senders[0].push([0], 5)):
        with pytest.raises(TypeError, match="a request is named by a str, not 5"):
            call()
    receiver.pull("r", [0], {"p0": [0], "p1": [0]}, 4).wait(10)
    for end in (*senders, receiver):
        end.close()
