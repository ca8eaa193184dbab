"""Requests: making, posting, ending (10.1, 10.4, 15, 16)."""
import asyncio
import gc
import os
import select

import nixl
import numpy as np
import pytest
from agents import agent, done, introduce


def xfer(a, b, op="WRITE", here=slice(0, 1024), there=slice(0, 1024), notif=b""):
    return a.initialize_xfer(op, a.get_xfer_descs([a.memory[here]]), a.get_xfer_descs([b.memory[there]]), b.name, notif)


def slow_pair(**params):
    two = [agent(name, backend_params={"LOOPBACK": params}) for name in ("alice", "bob")]
    for number, one in enumerate(two):
        one.memory = np.full(1 << 16, number + 1, np.uint8)
        one.regs = one.register_memory([one.memory])
    introduce(*two)
    return two


def test_write_and_read(pair):
    a, b = pair
    h = xfer(a, b)
    with pytest.raises(nixl.nixlNotPostedError):
        a.check_xfer_state(h)
    assert a.transfer(h) in ("DONE", "PROC")
    done(a, h)
    assert (b.memory[:1024] == 1).all() and (b.memory[1024:] == 2).all()
    h2 = xfer(a, b, "READ", slice(0, 4096), slice(8192, 12288))
    a.transfer(h2)
    assert h2.wait(10) == "DONE" and (a.memory[:4096] == 2).all()
    assert a.query_xfer_backend(h) in a.backends and a.query_xfer_path(h)
    assert h and repr(h).endswith("released=False>")
    h.release(), h.release(), a.release_xfer_handle(handle=h2)
    assert "released=True" in repr(h)
    with pytest.raises(nixl.nixlInvalidParamError):
        a.check_xfer_state(h)


def test_repost_a_thousand_times(pair):
    a, b = pair
    h = xfer(a, b, notif=b"n")
    for i in range(1000):
        a.memory[:1024] = i % 251
        a.transfer(h)
        done(a, h)
    assert (b.memory[:1024] == 999 % 251).all()
    seen = []
    while len(seen) < 1000:
        seen += b.get_new_notifs().get("alice", [])
    assert seen == [b"n"] * 1000


def test_prepared_lists(pair):
    a, b = pair
    local = a.prep_xfer_dlist("NIXL_INIT_AGENT", [(a.memory.ctypes.data + 64 * i, 64, 0) for i in range(512)], "DRAM")
    remote = a.prep_xfer_dlist(b"bob", np.array([(b.memory.ctypes.data + 64 * i, 64, 0) for i in range(512)], np.int64), "DRAM")
    a.memory[:] = np.arange(1 << 16) // 64 % 200
    order = np.random.default_rng(1).permutation(512)[:300]
    for indices in (order.astype(np.int32), order.tolist(), order.astype(np.uint64), order[::-1]):
        b.memory[:] = 255
        h = a.make_prepped_xfer("WRITE", local, indices, remote, np.arange(300, dtype=np.int16), b"done")
        a.transfer(h)
        done(a, h)
        assert (b.memory[:300 * 64].reshape(300, 64) == (np.asarray(indices) % 200)[:, None]).all()
        assert (b.memory[300 * 64:] == 255).all()
    h = a.make_prepped_xfer("READ", local, [5, 5, 6], remote, [0, 1, 2])
    remote.release(), local.release(), local.release()
    a.transfer(h)
    done(a, h)


def test_make_prepped_refusals(pair):
    a, b = pair
    block = a.memory.ctypes.data
    local = a.prep_xfer_dlist("", [(block, 64, 0), (block + 64, 32, 0)], "DRAM")
    remote = a.prep_xfer_dlist("bob", [(b.memory.ctypes.data, 64, 0), (b.memory.ctypes.data + 64, 64, 0)], "DRAM")
    bad = [(local, [], remote, []), (local, [0], remote, [0, 1]), (local, [2], remote, [0]), (local, [-1], remote, [0]),
           (local, [1], remote, [1]), (remote, [0], remote, [0]), (local, [0], local, [0])]
    equal = a.prep_xfer_dlist("", [(block, 64, 0), (block + 64, 64, 0)], "DRAM")
    bad += [(equal, [0, i], remote, [0, j]) for i, j in ((2, 0), (-1, 0), (1, 2), (1, -1))]
    for mine, li, theirs, ri in bad:
        with pytest.raises(nixl.nixlInvalidParamError):
            a.make_prepped_xfer("WRITE", mine, li, theirs, ri)
    with pytest.raises(ValueError):
        a.make_prepped_xfer("WRITE", local, np.zeros((1, 1), np.int64), remote, [0])
    with pytest.raises(nixl.nixlInvalidParamError):
        a.agent.makeXferReq(nixl.NIXL_WRITE, 77, [0], 78, [0])
    a.remove_remote_agent("bob")
    with pytest.raises(nixl.nixlNotFoundError):
        a.make_prepped_xfer("WRITE", local, [0], remote, [0])


def test_merging_counts(pair):
    a, b = pair
    os.environ["NIXL_TELEMETRY_ENABLE"] = "y"
    try:
        c = agent("carol", next(iter(a.backends)))
    finally:
        del os.environ["NIXL_TELEMETRY_ENABLE"]
    c.register_memory([a.memory])
    c.add_remote_agent(b.get_agent_metadata())
    rows = [(a.memory.ctypes.data + 64 * i, 64, 0) for i in range(8)]
    far = [(b.memory.ctypes.data + 64 * i, 64, 0) for i in range(8)]
    local, remote = c.prep_xfer_dlist("", rows, "DRAM"), c.prep_xfer_dlist("bob", far, "DRAM")
    for skip, count in ((False, 2), (True, 6), (np.True_, 6)):
        h = c.make_prepped_xfer("WRITE", local, [0, 1, 2, 5, 6, 7], remote, [0, 1, 2, 5, 6, 7], skip_desc_merge=skip)
        c.transfer(h)
        done(c, h)
        t = c.get_xfer_telemetry(h)
        assert (t.descCount, t.totalBytes) == (count, 384)


def test_strided_tables_move_the_right_blocks(pair):
    a, b = pair
    base, far = a.memory.ctypes.data, b.memory.ctypes.data
    a.memory[:] = np.arange(1 << 16) % 253
    local = a.prep_xfer_dlist("", np.array([(base, 16, 0, 100, 20), (base + 4000, 16, 0, 16, 12)], np.uint64), "DRAM")
    remote = a.prep_xfer_dlist("bob", np.array([(far, 16, 0, 16, 32)], np.uint64), "DRAM")
    h = a.make_prepped_xfer("WRITE", local, np.arange(32), remote, np.arange(32))
    a.transfer(h)
    done(a, h)
    expected = np.concatenate([a.memory[100 * i:100 * i + 16] for i in range(20)] + [a.memory[4000:4000 + 192]])
    assert (b.memory[:512] == expected).all()
    h = a.initialize_xfer("WRITE", a.get_xfer_descs(np.array([(base, 16, 0, 100, 4)], np.uint64), "DRAM"),
                          a.get_xfer_descs(np.array([(far + 4096, 16, 0, 32, 4)], np.uint64), "DRAM"), "bob")
    a.transfer(h)
    done(a, h)
    assert (b.memory[4096 + 96:4096 + 112] == a.memory[300:316]).all()


def test_coverage(pair):
    a, b = pair
    base = a.memory.ctypes.data
    inner = a.register_memory([(base + 100, 50, 0)], "DRAM")
    assert a.prep_xfer_dlist("", [(base, 1 << 16, 0), (base + 90, 100, 0), (base + (1 << 16) - 1, 1, 0)], "DRAM")
    for bad in ((base - 1, 2, 0), (base + (1 << 16) - 1, 2, 0), (base, 10, 1), (base + 10, (1 << 64) - 5, 0)):
        with pytest.raises(nixl.nixlNotFoundError, match="descriptor 1"):
            a.prep_xfer_dlist("", [(base, 1, 0), bad], "DRAM")
    with pytest.raises(nixl.nixlNotFoundError):
        a.prep_xfer_dlist("", nixl.nixlXferDList(nixl.DRAM_SEG))
    a.deregister_memory(inner)
    assert a.prep_xfer_dlist("", [(base + 90, 100, 0)], "DRAM")


@pytest.mark.parametrize("backend", ["LOOPBACK", "UCX"])
def test_descriptors_across_touching_regions(backend):
    """PY-32: regions that touch join, on either side, also in prepared and strided lists; a gap does not."""
    a, b = agent("alice", backend), agent("bob", backend)
    mine, theirs = np.arange(4096, dtype=np.uint16).view(np.uint8), np.zeros(8192, np.uint8)
    here, there = mine.ctypes.data, theirs.ctypes.data
    for start, end in ((0, 1000), (1000, 1001), (1001, 5000), (4000, 8000)):
        a.register_memory([(here + start, end - start, 0)], "DRAM")
    for start, end in ((0, 3000), (3000, 6000), (6000, 7000), (7001, 8192)):
        b.register_memory([(there + start, end - start, 0)], "DRAM")
    a.add_remote_agent(b.get_agent_metadata())
    local, remote = [(here, 7000, 0), (here + 10, 20, 0)], [(there, 7000, 0), (there + 7001, 20, 0)]
    h = a.initialize_xfer("WRITE", a.get_xfer_descs(local, "DRAM"), a.get_xfer_descs(remote, "DRAM"), "bob")
    a.transfer(h)
    done(a, h)
    assert (theirs[:7000] == mine[:7000]).all() and (theirs[7001:7021] == mine[10:30]).all() and not theirs[7021:].any()
    for bad in ((there, 7001, 0), (there + 6990, 20, 0)):
        with pytest.raises(nixl.nixlNotFoundError, match="descriptor 0"):
            a.prep_xfer_dlist("bob", [bad], "DRAM")
    theirs[:] = 0
    runs = np.array([[here, 100, 0, 200, 35]], np.uint64), np.array([[there, 100, 0, 200, 35]], np.uint64)
    sides = a.prep_xfer_dlist("", runs[0], "DRAM"), a.prep_xfer_dlist("bob", runs[1], "DRAM")
    h = a.make_prepped_xfer("WRITE", sides[0], np.arange(35), sides[1], np.arange(35))
    a.transfer(h)
    done(a, h)
    expected = mine[:7000].copy().reshape(35, 200)
    expected[:, 100:] = 0
    assert (theirs[:7000] == expected.reshape(-1)).all()


def test_handles_are_of_one_kind(pair):
    """A number that stands for a list is no transfer's, also when both are the agent's first."""
    a, b = pair
    h = xfer(a, b)
    listed = a.prep_xfer_dlist("", [(a.memory.ctypes.data, 64, 0)], "DRAM")
    assert listed._handle != h._handle
    with pytest.raises(nixl.nixlInvalidParamError, match="prepared list"):
        a.agent.postXferReq(listed._handle)
    with pytest.raises(nixl.nixlInvalidParamError, match="not a prepared list"):
        a.agent.makeXferReq(nixl.NIXL_WRITE, h._handle, [0], listed._handle, [0])
    a.agent.releasedDlistH(h._handle)  # nothing of that number among the lists
    assert a.transfer(h) in ("DONE", "PROC")


def test_handles_are_of_one_agent(pair):
    """The first request of one agent is not taken for the first request of another, and moves nothing of it."""
    a, b = pair
    handles, lists = [], []
    for one in pair:
        side = one.get_xfer_descs([(one.memory.ctypes.data, 64, 0)], "DRAM")
        other = one.get_xfer_descs([(one.memory.ctypes.data + 64, 64, 0)], "DRAM")
        one.memory[:64] = 77
        handles.append(one.initialize_xfer("WRITE", side, other, one.name))
        lists.append((one.prep_xfer_dlist("", side), one.prep_xfer_dlist(one.name, other)))
    for call in (b.transfer, b.check_xfer_state, b.query_xfer_backend, b.cancel_xfer):
        with pytest.raises(nixl.nixlInvalidParamError):
            call(handles[0])
    with pytest.raises(nixl.nixlInvalidParamError):
        b.make_prepped_xfer("WRITE", lists[0][0], [0], lists[1][1], [0])
    with pytest.raises(nixl.nixlInvalidParamError):
        b.make_prepped_xfer("WRITE", lists[1][0], [0], lists[0][1], [0])
    assert (b.memory[64:128] != 77).all() and (a.memory[64:128] != 77).all()
    a.transfer(handles[0])
    done(a, handles[0])
    assert (a.memory[64:128] == 77).all() and (b.memory[64:128] != 77).all()


def test_deregistration(pair):
    a, _ = pair
    again = a.register_memory([a.memory])
    other = np.zeros(10, np.uint8)
    with pytest.raises(nixl.nixlNotFoundError):
        a.deregister_memory(a.get_reg_descs([(a.memory.ctypes.data, 10, 0, "")], "DRAM"))
    with pytest.raises(nixl.nixlNotFoundError):
        a.deregister_memory(a.get_reg_descs([a.memory, other]))
    a.deregister_memory(again)  # counted: one registration is left
    local = a.prep_xfer_dlist("", [a.memory])
    a.deregister_memory([a.memory])
    with pytest.raises(nixl.nixlNotFoundError):
        a.prep_xfer_dlist("", [a.memory])
    with pytest.raises(nixl.nixlNotFoundError):
        a.deregister_memory([a.memory])
    local.release()


def test_post_after_deregistration(pair):
    a, b = pair
    h = xfer(a, b)
    a.transfer(h)
    done(a, h)
    a.deregister_memory(a.regs)
    with pytest.raises(nixl.nixlNotFoundError, match="deregistered"):
        a.transfer(h)
    assert a.check_xfer_state(h) == "DONE"


def test_initialize_refusals(pair):
    a, b = pair
    two, one = a.get_xfer_descs([a.memory[:64], a.memory[64:128]]), a.get_xfer_descs([b.memory[:64]])
    for local, remote in ((two, one), (one, two), (a.get_xfer_descs([a.memory[:32]]), one)):
        with pytest.raises((nixl.nixlInvalidParamError, nixl.nixlNotFoundError)):
            a.initialize_xfer("WRITE", local, remote, "bob")
    with pytest.raises(nixl.nixlInvalidParamError, match="2 local and 1 remote"):
        a.initialize_xfer("WRITE", two, one, "bob")
    with pytest.raises(TypeError):
        a.initialize_xfer("WRITE", None, one, "bob")
    with pytest.raises(KeyError):
        a.initialize_xfer("WRITE", two, one, "bob", backends=["GDS"])
    with pytest.raises(nixl.nixlNotFoundError):
        a.initialize_xfer("WRITE", nixl.nixlXferDList(nixl.DRAM_SEG), nixl.nixlXferDList(nixl.DRAM_SEG), "bob")


def test_one_descriptor_is_split(pair):
    a, b = pair
    parts = [a.memory[i * 100:i * 100 + n] for i, n in enumerate((10, 20, 30))]
    for i, part in enumerate(parts):
        part[:] = 100 + i
    h = a.initialize_xfer("WRITE", a.get_reg_descs(parts), a.get_reg_descs([b.memory[:60]]), "bob")
    a.transfer(h)
    done(a, h)
    assert b.memory[:61].tolist() == [100] * 10 + [101] * 20 + [102] * 30 + [2]


def test_running_requests():
    a, b = slow_pair(delay_us=1_000_000)
    h = xfer(a, b)
    assert a.transfer(h) == "PROC" and a.check_xfer_state(h) == "PROC"
    with pytest.raises(nixl.nixlRepostActiveError):
        a.transfer(h)
    assert h.wait(0.01) == "PROC" and h.wait() == "DONE" and a.check_xfer_state(h) == "DONE"
    a.transfer(h)
    a.cancel_xfer(h)
    for _ in range(3):
        with pytest.raises(nixl.nixlCancelledError):
            a.check_xfer_state(h)
    a.transfer(h)
    h.release()  # running: aborted
    b.memory[:] = 7
    gone = xfer(a, b)
    a.transfer(gone)
    del gone  # never released by hand
    gc.collect()
    assert h.wait.__self__ is h and (b.memory == 7).all()


def test_failure_is_sticky_and_the_handle_usable_again():
    a, b = slow_pair(fail_nth=1)
    h = xfer(a, b)
    with pytest.raises(nixl.nixlBackendError, match="fault plan"):
        a.transfer(h)
    for _ in range(2):
        with pytest.raises(nixl.nixlBackendError, match="fault plan"):
            a.check_xfer_state(h)
    assert a.transfer(h) == "DONE"


def test_full_queue_is_not_an_error():
    a, b = slow_pair(max_running=2, delay_us=1000)
    handles = [xfer(a, b, here=slice(64 * i, 64 * i + 64), there=slice(64 * i, 64 * i + 64), notif=b"%d" % i) for i in range(40)]
    assert {a.transfer(h) for h in handles} == {"PROC"}
    seen = []
    while len(seen) < 40:
        seen += b.get_new_notifs().get("alice", [])
    assert [h.wait(5) for h in handles] == ["DONE"] * 40 and (b.memory[:2560] == 1).all()


def test_removed_peer(pair):
    a, b = pair
    h = xfer(a, b)
    a.transfer(h)
    done(a, h)
    a.remove_remote_agent("bob")
    assert a.check_xfer_state(h) == "DONE"
    with pytest.raises(nixl.nixlNotFoundError, match="removed"):
        a.transfer(h)
    a.add_remote_agent(b.get_agent_metadata())
    with pytest.raises(nixl.nixlNotFoundError):
        a.transfer(h)
    h.release()
    h = xfer(a, b)
    a.transfer(h)
    done(a, h)


def test_removed_while_running():
    a, b = slow_pair(delay_us=2_000_000)
    h = xfer(a, b)
    a.transfer(h)
    a.remove_remote_agent("bob")
    with pytest.raises(nixl.nixlNotFoundError):
        a.check_xfer_state(h)
    h.release()


def test_event_descriptor(pair):
    a, b = pair
    fd = b.event_fd()
    assert b.event_fd() == fd
    select.select([fd], [], [], 0) and os.read(fd, 8)
    a.send_notif("bob", b"wake")
    assert select.select([fd], [], [], 10)[0] and os.read(fd, 8)
    assert b.get_new_notifs() == {"alice": [b"wake"]}
    slow, _ = slow_pair(delay_us=20_000)
    fd = slow.event_fd()
    os.read(fd, 8)
    h = slow.initialize_xfer("WRITE", slow.get_xfer_descs([slow.memory[:8]]), slow.get_xfer_descs([slow.memory[8:16]]), "alice")
    slow.transfer(h)
    assert select.select([fd], [], [], 10)[0] and slow.check_xfer_state(h) == "DONE"


@pytest.mark.parametrize("thread", [True, False])
def test_await(thread):
    a = agent("a", enable_prog_thread=thread, backend_params={"LOOPBACK": {"delay_us": 5000}})
    memory = np.zeros(4096, np.uint8)
    a.register_memory([memory])

    async def one(i):
        memory[i] = i
        h = a.initialize_xfer("WRITE", a.get_xfer_descs([memory[i:i + 1]]), a.get_xfer_descs([memory[2048 + i:2049 + i]]), "a")
        a.transfer(h)
        return await asyncio.wait_for(_as_task(h), 10)

    async def _as_task(h):
        return await h

    async def all_of_them():
        return await asyncio.gather(*(one(i) for i in range(50)))

    assert asyncio.run(all_of_them()) == ["DONE"] * 50 and memory[2048:2098].tolist() == list(range(50))


def test_estimate(pair):
    a, b = pair
    try:
        duration, margin, method = a.estimate_xfer_cost(xfer(a, b))
    except nixl.nixlNotSupportedError:
        assert "LOOPBACK" in a.backends or a.backends
    else:
        assert duration >= 0 and margin >= 0 and method == "ANALYTICAL_BACKEND"


def test_views_answer_not_supported(pair):
    a, b = pair
    for backends in (None, list(a.backends)):
        with pytest.raises(nixl.nixlNotSupportedError, match=r"'alice' \(\w+\) lets kernels use memory by themselves"):
            a.prep_mem_view(a.get_xfer_descs([a.memory]), backends=backends)
    with pytest.raises(nixl.nixlNotFoundError, match="ghost"):
        a.prep_mem_view(a.get_remote_descs([(1, 10, 0, "ghost")], "DRAM"))
    with pytest.raises(nixl.nixlNotSupportedError, match="of agent 'bob'"):
        a.prep_mem_view(a.get_remote_descs([(b.memory.ctypes.data, 10, 0, "bob")], "DRAM"))


def test_connection(pair):
    pair[0].make_connection("bob")
    pair[0].make_connection(b"bob", backends=list(pair[0].backends))


def test_objects_die_in_any_order():
    for order in range(6):
        a, b = slow_pair(delay_us=100_000)
        h, side = xfer(a, b), a.prep_xfer_dlist("", [a.memory])
        a.transfer(h)
        alive = [a, b, h]
        del a, b
        for _ in range(3):
            del alive[order % len(alive)]
            gc.collect()
        side.release()
        del h
        gc.collect()
