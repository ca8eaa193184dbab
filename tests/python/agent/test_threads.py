"""Threads, fork, interpreter exit (14, PY-26)."""
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import nixl
import numpy as np
import pytest
from agents import agent, done, introduce, need_backend


@pytest.mark.parametrize("mode", list(nixl.nixl_thread_sync_t))
@pytest.mark.parametrize("backend", ["LOOPBACK", "UCX"])
def test_eight_threads_one_agent(mode, backend):
    a, b = agent("a", backend, sync_mode=mode), agent("b", backend)
    far = np.zeros(8 * 4096, np.uint8)
    b.register_memory([far])
    introduce(a, b)
    failures = []

    def work(thread):
        try:
            for i in range(25):
                mine = np.full(4096, thread * 25 + i, np.uint8)
                regs = a.register_memory([mine])
                there = far[thread * 4096:(thread + 1) * 4096]
                h = a.initialize_xfer("WRITE", a.get_xfer_descs([mine]), a.get_xfer_descs([there]), "b", b"t%d" % thread)
                a.transfer(h)
                done(a, h)
                assert (there == mine).all()
                h.release()
                a.deregister_memory(regs)
                if thread == 0:
                    a.add_remote_agent(b.get_agent_metadata())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
    [t.start() for t in threads]
    seen = []
    while any(t.is_alive() for t in threads):
        seen += b.get_new_notifs().get("a", [])
    [t.join() for t in threads]
    deadline = time.monotonic() + 10
    while len(seen) < 200 and not failures and time.monotonic() < deadline:
        seen += b.get_new_notifs().get("a", [])
    assert not failures and len(seen) == 200


def test_gil_is_free_while_waiting():
    a = agent("a", backend_params={"LOOPBACK": {"delay_us": 300_000}})
    memory = np.zeros(64, np.uint8)
    a.register_memory([memory])
    h = a.initialize_xfer("WRITE", a.get_xfer_descs([memory[:8]]), a.get_xfer_descs([memory[8:16]]), "a")
    a.transfer(h)
    waiter = threading.Thread(target=h.wait)
    waiter.start()
    turns = 0
    while waiter.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 3


@pytest.mark.parametrize("backend", ["LOOPBACK", "UCX"])
def test_fork(backend):
    """The child of a fork gets a clean error from the parent's agent, makes its own, and the parent goes on."""
    code = textwrap.dedent(f"""
        import os, sys
        os.environ["NIXL_LOOPBACK"] = "y"
        import numpy as np, nixl
        from nixl._api import nixl_agent, nixl_agent_config
        conf = lambda: nixl_agent_config(backends=["{backend}"])
        def use(a):
            m = np.arange(64, dtype=np.uint8)
            a.register_memory([m])
            h = a.initialize_xfer("WRITE", a.get_xfer_descs([m[:8]]), a.get_xfer_descs([m[8:16]]), a.name)
            a.transfer(h)
            assert h.wait(10) == "DONE" and (m[8:16] == m[:8]).all()
            return h
        a = nixl_agent("parent", conf())
        h = use(a)
        pid = os.fork()
        if pid == 0:
            try:
                a.check_xfer_state(h)
            except nixl.nixlNotAllowedError as error:
                assert "parent" in str(error)
            else:
                os._exit(3)
            h.release()
            del a, h
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        use(a)
        """)
    nixl.plugin_report()[backend]["available"] or pytest.skip(nixl.plugin_report()[backend]["reason"])
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_agent_of_a_forked_child():
    """Parent and child, which has its own agent, transfer to each other, although the parent had used its agent before the fork."""
    code = textwrap.dedent(r"""
        import os, sys
        import numpy as np
        from nixl._api import nixl_agent, nixl_agent_config

        def fresh(name):
            one = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
            one.memory = np.full(64, ord(name[0]), np.uint8)
            one.register_memory([one.memory])
            return one

        def move(one, op, address, name):
            h = one.initialize_xfer(op, one.get_xfer_descs([one.memory[:8]]), one.get_xfer_descs([(address, 8, 0)], "DRAM"), name)
            one.transfer(h)
            assert h.wait(20) == "DONE"
            h.release()

        def say(pipe, one):
            os.write(pipe, f"{one.get_agent_metadata().hex()} {one.memory.ctypes.data}\n".encode())

        def meet(pipe, one):
            blob, address = os.read(pipe, 1 << 20).split()
            one.add_remote_agent(bytes.fromhex(blob.decode()))
            return int(address)

        parent = fresh("parent")
        move(parent, "WRITE", parent.memory.ctypes.data + 32, "parent")
        (child_reads, to_child), (parent_reads, to_parent) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            child = fresh("child")
            say(to_parent, child)
            address = meet(child_reads, child)
            move(child, "READ", address, "parent")
            assert (child.memory[:8] == ord("p")).all() and (child.memory[8:16] == ord("c")).all()
            assert os.getpid().to_bytes(8, "little") in child.get_agent_metadata()  # by which peers tell whether it lives
            os.write(to_parent, b"x")
            os.read(child_reads, 1)
            os._exit(0 if (child.memory[16:24] == ord("p")).all() else 3)
        say(to_child, parent)
        address = meet(parent_reads, parent)
        move(parent, "WRITE", address + 16, "child")
        assert os.read(parent_reads, 1) == b"x"
        os.write(to_child, b"x")
        assert os.waitpid(pid, 0)[1] == 0
        """)
    need_backend("UCX")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_interpreter_exit_with_everything_alive():
    code = textwrap.dedent("""
        import os
        os.environ["NIXL_LOOPBACK"] = "y"
        import numpy as np
        from nixl._api import nixl_agent, nixl_agent_config
        conf = nixl_agent_config(True, True, 0, backends=["LOOPBACK"], backend_params={"LOOPBACK": {"delay_us": 50000}})
        a = nixl_agent("a", conf)
        m = np.zeros(4096, np.uint8)
        regs = a.register_memory([m])
        h = a.initialize_xfer("WRITE", a.get_xfer_descs([m[:8]]), a.get_xfer_descs([m[8:16]]), "a", b"x")
        p = a.prep_xfer_dlist("", [m])
        a.transfer(h)
        a.fetch_remote_metadata("nobody", "10.255.255.1", 1)
        class Last:
            def __del__(self):
                a.release_xfer_handle(h)
        last = Last()
        other = np.zeros(4096, np.uint8)
        a.register_memory([other])
        other = None  # freed while registered
        """)
    out = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert "leak" not in out.stderr and "Traceback" not in out.stderr


def test_idle_agents_sleep():
    """An idle agent costs no processor: measured over a second, with its progress thread on."""
    a = agent("idle", "UCX")
    time.sleep(0.3)
    before = sum(os.times()[:2])
    time.sleep(1.0)
    used = sum(os.times()[:2]) - before
    assert used < 0.2, f"{used} s of processor time in one second"
    assert a.name == "idle"


def test_a_wait_without_end_hears_signals():
    """Ctrl-C ends handle.wait(): the transfer goes on and can be waited for again."""
    one = agent("a", backend_params={"LOOPBACK": {"delay_us": 3_000_000}})
    memory = np.zeros(64, np.uint8)
    one.register_memory([memory])
    descs = one.get_xfer_descs([memory])
    handle = one.initialize_xfer("WRITE", descs, descs, "a")
    one.transfer(handle)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            handle.wait()
        assert time.monotonic() - start < 2
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert handle.wait(0.01) == "PROC" and handle.wait(float("nan")) == "PROC" and handle.wait() == "DONE"


@pytest.mark.parametrize("call", ["one.get_new_notifs()", "handle.wait(0.05)", "one.get_agent_metadata()"])
def test_interpreter_exit_under_daemon_threads(call):
    """PY-26: threads that poll an agent until the process ends take nothing with them."""
    code = textwrap.dedent("""
        import os, threading, time
        os.environ["NIXL_LOOPBACK"] = "y"
        import nixl, numpy as np
        one = nixl.nixl_agent("a", nixl.nixl_agent_config(backends=["LOOPBACK"],
                                                          backend_params={"LOOPBACK": {"delay_us": 60_000_000}}))
        memory = np.zeros(64, np.uint8)
        one.register_memory([memory])
        descs = one.get_xfer_descs([memory])
        handle = one.initialize_xfer("WRITE", descs, descs, "a")
        one.transfer(handle)
        started = threading.Barrier(5)
        def poll():
            started.wait()
            while True:
                CALL
        for _ in range(4):
            threading.Thread(target=poll, daemon=True).start()
        started.wait()
        time.sleep(0.1)
        """).replace("CALL", call)
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
