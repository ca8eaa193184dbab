"""Where ranks meet: a torch store, a store of four methods, etcd; who cannot meet; and agreement on masks."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request

import pytest
from ep_cases import Options, Shape, group_operation, memory_bytes, no_problems, open_buffer, run_operation, run_operations
from hosts import etcd_server, far_host

SHAPE = Shape()
LIMIT_S = 30


# --------------------------------------------------------------------------------------------------------------- stores


class PlainStore:
    """A store that is no torch store: it tells expiry by Python's own TimeoutError, without a text."""

    def __init__(self, store):
        self.inner = store
        self.set, self.multi_get, self.delete_key = store.set, store.multi_get, store.delete_key

    def wait(self, keys, timeout):
        end = time.monotonic() + timeout.total_seconds()
        while not self.inner.check(keys):
            if time.monotonic() >= end:
                raise TimeoutError
            time.sleep(0.001)


def plain_store(rank):
    import nixl_ep

    os.environ["NIXL_EP_CONNECT_TIMEOUT_MS"] = "1500"
    problems = []
    try:
        buffer = nixl_ep.Buffer(rank.rank, explicitly_destroy=True, device=rank.device, combine="exact")
        buffer.update_memory_buffers(4, SHAPE.experts_per_rank, memory_bytes(SHAPE))
        buffer.set_tcp_store_group(PlainStore(rank.store()))
        if rank.rank == 1:
            time.sleep(0.2)  # waits of the other expire meanwhile
        buffer.connect_ranks([0, 1])
        problems += run_operations(buffer, rank, [0, 1], 1)
        try:
            buffer.connect_ranks([3])
            problems.append("a connect with an absent rank returned")
        except RuntimeError as error:
            if "3" not in str(error):
                problems.append(f"does not name rank 3: {error}")
        buffer.destroy()
    finally:
        del os.environ["NIXL_EP_CONNECT_TIMEOUT_MS"]
    return problems


def test_a_store_that_raises_timeout_error(ranks_of):
    no_problems(ranks_of(4).run(plain_store, ranks=[0, 1], timeout=30))


class StoreOfFour:
    """Offers the four methods that a store must have, and nothing else."""

    def __init__(self, store):
        self.inner, self.keys, self.deleted = store, set(), set()

    def set(self, key, value):
        self.keys.add(key)
        self.inner.set(key, value)

    def wait(self, keys, timeout=None):
        self.inner.wait(keys) if timeout is None else self.inner.wait(keys, timeout)

    def multi_get(self, keys):
        return self.inner.multi_get(keys)

    def delete_key(self, key):
        self.deleted.add(key)
        return self.inner.delete_key(key)


def store_use(rank):
    """The README's flow on a store of four methods; every key under NIXL_EP/ and gone at the end."""
    import nixl_ep

    store = StoreOfFour(rank.store())
    buffer = nixl_ep.Buffer(rank.rank, explicitly_destroy=True, device=rank.device, combine="exact")
    buffer.update_memory_buffers(4, SHAPE.experts_per_rank, memory_bytes(SHAPE))
    try:
        buffer.connect_ranks([r for r in range(2) if r != rank.rank] or [0])
        problems = ["connected without a store"]
    except RuntimeError:
        problems = []
    buffer.set_tcp_store_group(store)
    if rank.rank < 2:
        buffer.connect_ranks([0, 1])
        problems += run_operations(buffer, rank, [0, 1], 1)
        buffer.connect_ranks([2, 3])
    else:
        buffer.connect_ranks(range(4))
    problems += run_operations(buffer, rank, range(4), 2)
    if rank.rank == 3:
        buffer.destroy()
    else:
        buffer.disconnect_ranks([3])
        problems += run_operations(buffer, rank, range(3), 2)
        buffer.set_tcp_store_group(None)
        buffer.destroy()
    if not all(key.startswith("NIXL_EP/") for key in store.keys):
        problems.append(f"keys {store.keys}")
    if f"NIXL_EP/{rank.rank}" not in store.keys:
        problems.append(f"no key NIXL_EP/{rank.rank} among {store.keys}")
    if store.keys - store.deleted:
        problems.append(f"left in the store: {store.keys - store.deleted}")
    return problems


def test_store_protocol(ranks_of):
    no_problems(ranks_of(4).run(store_use))


# ------------------------------------------------------------------------------------------------------------ agreement


def agree(rank):
    """Ranks 0 and 1 have masked 2, nobody else has; afterwards all but 2 mask it, and 2 masks nobody new."""
    buffer = open_buffer(rank, SHAPE)
    store = rank.store()
    problems = []
    if buffer.agree_mask(store) != []:
        problems.append("masks out of nothing")
    if rank.rank in (0, 1):
        buffer.update_mask_buffer(2, True)
    if rank.rank != 2:
        union = buffer.agree_mask(store)
        if union != [2] or buffer.active_ranks() != ([0, 1, 3], [0, 1, 3]):
            problems.append(f"rank {rank.rank}: agreed on {union}, active {buffer.active_ranks()}")
        again = buffer.agree_mask(store)
        if again != [2]:
            problems.append(f"rank {rank.rank}: agreed again on {again}")
        rank.meet("agreed", [0, 1, 3])
        keys = [f"NIXL_EP/agree/0/{rank.rank}"]
        if store.check(keys):
            problems.append(f"{keys[0]} is still in the store two agreements later")
    buffer.destroy()
    return problems


def test_all_mask_what_one_has_masked(ranks_of):
    """Section 8 row 5."""
    no_problems(ranks_of(4).run(agree))


def agree_after_join(rank):
    """Two agree twice, a third joins, and all agree: who joined counts as the others do."""
    buffer = open_buffer(rank, SHAPE, connect=[0, 1] if rank.rank < 2 else [])
    store, problems = rank.store(), []
    if rank.rank < 2:
        for _ in range(2):
            buffer.agree_mask(store)
    buffer.connect_ranks([0, 1, 2])
    if buffer.agree_mask(store) != []:
        problems.append(f"rank {rank.rank} masks somebody after a join: {buffer.active_ranks()}")
    rank.meet("done", range(3))
    buffer.destroy()
    return problems


def test_agreement_after_a_join(ranks_of):
    no_problems(ranks_of(4).run(agree_after_join, ranks=range(3)))


# ----------------------------------------------------------------------------------------------------------------- etcd


def meet_in_etcd(rank, endpoint):
    import nixl_ep

    os.environ["NIXL_ETCD_ENDPOINTS"] = endpoint
    try:
        buffer = nixl_ep.Buffer(rank.rank, explicitly_destroy=True, device=rank.device)
        buffer.update_memory_buffers(SHAPE.ranks, SHAPE.experts_per_rank, memory_bytes(SHAPE))
        buffer.connect_ranks(list(range(SHAPE.ranks)))
        combine = {"cpu": "exact", "cuda": "reduced"}[rank.device]
        options = Options(combine=combine)
        problems = run_operation(buffer, rank, group_operation(SHAPE, options.payload, combine, 1), options)
        buffer.destroy()
        return problems
    finally:
        del os.environ["NIXL_ETCD_ENDPOINTS"]


def refused_by_etcd(rank, endpoint):
    os.environ["NIXL_ETCD_ENDPOINTS"] = endpoint
    try:
        buffer = open_buffer(rank, SHAPE, connect=[])
        buffer.set_tcp_store_group(None)
        try:
            buffer.connect_ranks([0, 1])
            return ["connected through a server that is gone"]
        except RuntimeError as error:
            return [] if endpoint in str(error) else [f"the server is not named: {error}"]
        finally:
            buffer.destroy()
    finally:
        del os.environ["NIXL_ETCD_ENDPOINTS"]


def test_the_readme_flow_meets_in_etcd(ranks_of, tmp_path):
    with etcd_server(tmp_path) as (endpoint, server):
        no_problems(ranks_of(4).run(meet_in_etcd, endpoint))
        everything = json.dumps({"key": "AA==", "range_end": "AA==", "keys_only": True}).encode()
        with urllib.request.urlopen(endpoint + "/v3/kv/range", everything, timeout=LIMIT_S) as answer:
            assert "kvs" not in json.load(answer), "keys are left in etcd"
        server.kill()
        server.wait()
        no_problems(ranks_of(4).run(refused_by_etcd, endpoint, ranks=[0]))


# ----------------------------------------------------------------------------------------- who cannot meet, or dies of it

LONE_RANK = """
    import sys, torch.distributed as dist, nixl_ep
    rank, port = int(sys.argv[1]), int(sys.argv[2])
    store = dist.TCPStore(sys.argv[3], port, is_master=False, wait_for_workers=False)
    buffer = nixl_ep.Buffer(rank=rank, explicitly_destroy=True, tcp_store_group=store, device="cpu")
    buffer.update_memory_buffers(3, 2, nixl_ep.Buffer.get_rdma_size_hint(8, 128, 3, 6))
    print("ready", flush=True)
    try:
        buffer.connect_ranks([0, 1, 2])
        print("connected", flush=True)
    except RuntimeError as error:
        print("refused:", error, flush=True)
"""


def lone_rank(rank, port, host="127.0.0.1", prefix=(), timeout_ms=20_000):
    command = [*prefix, sys.executable, "-c", textwrap.dedent(LONE_RANK), str(rank), str(port), host]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "NIXL_EP_CONNECT_TIMEOUT_MS": str(timeout_ms)})


def finish(*processes):
    try:
        return [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def shared_memories(pid):
    """How many shared memories a process has mapped; a rank of the CPU path has three of its own."""
    with open(f"/proc/{pid}/maps") as maps:
        return len({line.split()[4] for line in maps if "/memfd:" in line})


@pytest.fixture
def tcp_store():
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_a_peer_killed_while_connecting_is_named_at_once(tcp_store):
    """Two wait for a third; one of the two is killed; the other says so long before its deadline."""
    survivor, victim = lone_rank(0, tcp_store.port), lone_rank(1, tcp_store.port)
    for process in (survivor, victim):
        assert process.stdout.readline() == "ready\n"
    own, end = 3, time.monotonic() + LIMIT_S
    while min(shared_memories(process.pid) for process in (survivor, victim)) <= own and time.monotonic() < end:
        time.sleep(0.01)  # until each has mapped the other's memory beside its own
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    out, _ = finish(survivor, victim)
    assert f"rank 1 (process {victim.pid}) died while connecting" in out
    assert time.monotonic() - killed < 10
    assert not tcp_store.check(["NIXL_EP/0"])


def test_another_network_namespace_is_refused_with_the_reason(tcp_store):
    """Both sides say it. The far one reaches the store through a pair of virtual interfaces."""
    with far_host() as host:
        near = lone_rank(0, tcp_store.port)
        far = lone_rank(1, tcp_store.port, host.near, host.prefix)
        answers = finish(near, far)
        assert "rank 1 cannot be connected" in answers[0] and "another network namespace" in answers[0], answers
        assert "rank 0 cannot be connected" in answers[1] and "another network namespace" in answers[1], answers
        assert not tcp_store.check(["NIXL_EP/0"]) and not tcp_store.check(["NIXL_EP/1"])


# -------------------------------------------------------------------------------------------------------------- signals


INTERRUPTED = """
    import os, signal, sys, threading, nixl_ep, torch.distributed as dist

    buffer = nixl_ep.Buffer(rank=0, explicitly_destroy=True, device="cpu")
    buffer.update_memory_buffers(2, 2, 1 << 20)

    def leave(*_):
        buffer.destroy()
        sys.exit(7)

    if sys.argv[1] == "destroy":
        signal.signal(signal.SIGINT, leave)
    entered = threading.Event()

    class Store:
        def __init__(self):
            self.inner = dist.HashStore()
            self.set, self.multi_get, self.delete_key = self.inner.set, self.inner.multi_get, self.inner.delete_key

        def check(self, keys):
            entered.set()
            return self.inner.check(keys)

        def wait(self, keys, timeout):
            raise AssertionError("a store that can check is asked by check")

    buffer.set_tcp_store_group(Store())

    def interrupt():
        entered.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        buffer.connect_ranks([1])
    except KeyboardInterrupt:
        buffer.destroy()
        sys.exit(8)
"""


@pytest.mark.parametrize(("handler", "code"), [("default", 8), ("destroy", 7)])
def test_a_signal_ends_a_connect(handler, code):
    """Ctrl-C stays what it is, and a handler may destroy the buffer that is being connected."""
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), handler]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == code, done.stdout + done.stderr
