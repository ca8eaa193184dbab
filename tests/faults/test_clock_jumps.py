"""A wall clock that jumps by days every 50 ms: no wait ends early or never, nobody is lost or kept, no byte is wrong."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from agents import need_backend

SUPPORT = os.path.join(os.path.dirname(__file__), "..", "support")
LIMIT_S = 120
HEAD = textwrap.dedent(
    f"""
    import os, sys, time, threading
    sys.path.insert(0, {SUPPORT!r})
    os.environ["NIXL_LOOPBACK"] = "y"
    seen, start = set(), time.monotonic()
    while len(seen) < 4 and time.monotonic() - start < 10:
        seen.add(int(time.time() - start) // 40000)
    assert len(seen) >= 4, "the clock does not jump"
    import numpy as np

    def timed(low, high, call, *arguments):
        start = time.monotonic()
        result = call(*arguments)
        took = time.monotonic() - start
        assert low <= took < high, f"{{call}} took {{took:.3f}} s, {{low}} to {{high}} are right"
        return result
    """
)
AGENTS = HEAD + textwrap.dedent(
    """
    from nixl._api import nixl_agent, nixl_agent_config
    from agents import until
    import subprocess

    def fresh(name, backend="UCX", **config):
        one = nixl_agent(name, nixl_agent_config(backends=[backend], **config))
        one.memory = np.full(1 << 20, ord(name[0]), np.uint8)
        one.register_memory([one.memory])
        return one

    # A wait with a limit on something that takes longer, and one that is over before.
    slow = fresh("slow", "LOOPBACK", backend_params={"LOOPBACK": {"delay_us": 700_000}})
    h = slow.initialize_xfer("WRITE", slow.get_xfer_descs([slow.memory[:8]]), slow.get_xfer_descs([slow.memory[8:16]]), "slow")
    slow.transfer(h)
    assert timed(0.19, 0.6, h.wait, 0.2) == "PROC"
    assert timed(0.0, 10, h.wait, 30) == "DONE"

    # Metadata by socket, transfers and notifications both ways, for a while.
    a, b = fresh("a", enable_listen_thread=True, listen_port=0), fresh("b")
    b.fetch_remote_metadata("a", "127.0.0.1", a.get_listen_port())
    b.send_local_metadata("127.0.0.1", a.get_listen_port())
    until(lambda: a.check_remote_metadata("b") and b.check_remote_metadata("a"))
    end, rounds, notifications = time.monotonic() + 3, 0, 0
    while time.monotonic() < end:
        for op, mine, other in (("WRITE", a, b), ("READ", b, a)):
            mine.memory[:] = rounds % 251
            h = mine.initialize_xfer(op, mine.get_xfer_descs([mine.memory]), mine.get_xfer_descs([other.memory]), other.name, b"x")
            mine.transfer(h)
            assert h.wait(20) == "DONE" and (mine.memory == other.memory).all()
            h.release()
            rounds += 1
        notifications += sum(len(x) for one in (a, b) for x in one.get_new_notifs().values())
    while notifications < rounds and time.monotonic() < end + 20:
        notifications += sum(len(x) for one in (a, b) for x in one.get_new_notifs().values())
    assert notifications == rounds > 10, (notifications, rounds)
    assert a.check_remote_metadata("b") and b.check_remote_metadata("a")

    # A fetch from nobody ends in its time and holds up neither the caller nor the end.
    a.fetch_remote_metadata("nobody", "10.255.255.1", 9)
    del h, mine, other
    timed(0, 5, globals().pop, "a")  # destroys it
    print("done", rounds)
    """
)
RANKS = HEAD + textwrap.dedent(
    """
    os.environ["NIXL_EP_CONNECT_TIMEOUT_MS"] = "700"
    import torch, nixl_ep

    class Store:
        values, changed = {}, threading.Condition()
        def set(self, key, value):
            with self.changed:
                self.values[key] = value
                self.changed.notify_all()
        def wait(self, keys, timeout):
            end = time.monotonic() + timeout.total_seconds()
            with self.changed:
                while not all(key in self.values for key in keys):
                    if time.monotonic() >= end:
                        raise TimeoutError
                    self.changed.wait(0.01)
        def multi_get(self, keys):
            with self.changed:
                return [self.values[key] for key in keys]
        def delete_key(self, key):
            with self.changed:
                return self.values.pop(key, None) is not None

    def fresh(rank):
        buffer = nixl_ep.Buffer(rank=rank, explicitly_destroy=True, tcp_store_group=Store(), timeout_ms=400, device="cpu")
        buffer.update_memory_buffers(2, 2, nixl_ep.Buffer.get_rdma_size_hint(8, 1024, 2, 4))
        return buffer

    def together(*calls):
        errors = []
        def guarded(call):
            try:
                call()
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
        [t.start() for t in threads], [t.join() for t in threads]
        if errors:
            raise errors[0]

    def operate(buffer, rank):
        x = torch.full((8, 1024), rank + 1, dtype=torch.bfloat16)
        ids = torch.arange(16).reshape(8, 2) % 4
        out, count, handle, event, hook = buffer.dispatch(x, ids, 8, use_fp8=False)
        y, event, hook = buffer.combine(out, ids, torch.full((8, 2), 0.5), handle)
        return [fault.rank for fault in buffer.fault_status()], (y == x).all().item()

    first = fresh(0)
    try:
        timed(0.69, 3, first.connect_ranks, [1])
    except RuntimeError as error:
        assert "700 ms" in str(error), error
    else:
        raise AssertionError("a rank that does not exist was connected")
    second = fresh(1)
    os.environ["NIXL_EP_CONNECT_TIMEOUT_MS"] = "20000"
    first.destroy()
    first = fresh(0)
    second.destroy()
    second = fresh(1)
    together(lambda: first.connect_ranks([1]), lambda: second.connect_ranks([0]))
    end, last, rounds_of = time.monotonic() + 3, [None], [0, 0]
    def serve(buffer, rank):
        while last[0] is None or rounds_of[rank] < last[0]:
            faults, right = operate(buffer, rank)
            assert not faults and right, (rank, faults, right)
            rounds_of[rank] += 1
            if rank == 0 and last[0] is None and time.monotonic() > end:
                last[0] = rounds_of[0] + 2
    together(lambda: serve(first, 0), lambda: serve(second, 1))
    # The other does not answer: masked after the timeout, not before and not much after.
    faults, right = timed(0.39, 2.5, operate, first, 0)
    assert faults == [1], faults
    first.destroy(), second.destroy()
    print("done", rounds_of)
    """
)


@pytest.fixture(scope="module")
def jumping(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("clock") / "jumping_clock.so"
    source = os.path.join(SUPPORT, "jumping_clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), source], check=True, timeout=60)
    return {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("what", ["agents", "ranks"])
def test_nothing_counts_on_the_wall_clock(jumping, what):
    if what == "agents":
        need_backend("UCX")
    script = AGENTS if what == "agents" else RANKS
    done = subprocess.run([sys.executable, "-c", script], env=jumping, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
