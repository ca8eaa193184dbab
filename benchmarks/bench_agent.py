"""./run bench agent: what the agent costs beside what it stands on, each figure with its must and goal.

Groups: network (UCX over TCP beside a program written straight on ucp), shared (the same by two threads), notifications, idle, descriptors, setup.
Everything runs between two processes of this host; READ and WRITE results are compared byte for byte before they are timed.
"""

import contextlib
import json
import os
import resource
import select
import statistics
import subprocess
import sys
import time

import numpy as np
from utils.figures import Figure, parse_arguments, ratio, report
from utils.floor import floor, program, raw_ucx

os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # the log goes to standard output, where the peer answers
DEVICE = "lo"  # named: an interface that appears meanwhile must not be taken
NETWORK = {"UCX": {"same_host": "false", "UCX_TLS": "tcp", "UCX_NET_DEVICES": DEVICE}}
BYTES = 256 << 20
MILLION = 1_000_000
DEADLINE_S = 60


def best(repetitions, body):
    """The least of several timings of body(), seconds."""
    least = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        body()
        least = min(least, time.perf_counter() - start)
    return least


def make_agent(name, **options):
    from nixl import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"], **options))


def run_transfer(agent, handle):
    state = agent.transfer(handle)
    while state != "DONE":
        state = agent.check_xfer_state(handle)


# ---- the other process: one agent with one buffer, driven by lines of JSON ----


def peer_main():
    options = json.loads(sys.argv[2])
    agent = make_agent("peer", **options["agent"])
    buffer = np.zeros(options["bytes"], dtype=np.uint8)
    registered = agent.register_memory(agent.get_reg_descs([(buffer.ctypes.data, buffer.nbytes, 0)], "DRAM"))
    answer({"metadata": agent.get_agent_metadata().hex(), "address": buffer.ctypes.data})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "load":
            agent.add_remote_agent(bytes.fromhex(command["metadata"]))
            answer({})
        elif command["do"] == "sum":
            answer({"sum": int(buffer[: command["bytes"]].view(np.uint64).sum())})
        elif command["do"] == "fill":
            buffer[:] = command["value"]
            answer({})
        elif command["do"] == "echo":  # answers `count` notifications as they come
            answer({})
            for _ in range(command["count"]):
                message = None
                while message is None:
                    for messages in agent.get_new_notifs().values():
                        message = messages[0]
                agent.send_notif(command["to"], message)
        elif command["do"] == "echo_asleep":  # the same, asleep on the event descriptor between messages
            answer({})
            for _ in range(command["count"]):
                agent.send_notif(command["to"], asleep_until_message(agent))
        elif command["do"] == "cpu":  # of this process while it does nothing
            before = cpu_seconds()
            start = time.perf_counter()
            time.sleep(command["seconds"])
            answer({"share": (cpu_seconds() - before) / (time.perf_counter() - start)})
    agent.deregister_memory(registered)


def asleep_until_message(agent):
    """Sleeps on the agent's event descriptor until a notification is there; its bytes."""
    events = agent.event_fd()
    while True:
        if new := agent.get_new_notifs():
            return next(iter(new.values()))[0]
        select.select([events], [], [])
        os.read(events, 8)


def answer(value):
    print(json.dumps(value), flush=True)


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Peer:
    """The other process. Its agent is called "peer"."""

    def __init__(self, size, **agent_options):
        options = json.dumps({"agent": agent_options, "bytes": size})
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--peer", options], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        hello = self.read()
        self.metadata, self.address = bytes.fromhex(hello["metadata"]), hello["address"]

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the peer process ended early; its messages are above")
        return json.loads(line)

    def ask(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Pair:
    """Our agent and the peer's, knowing each other, each with one registered buffer."""

    def __init__(self, size, **agent_options):
        self.peer = Peer(size, **agent_options)
        self.agent = make_agent("initiator", **agent_options)
        self.buffer = np.zeros(size, dtype=np.uint8)
        self.registered = self.agent.register_memory(self.agent.get_reg_descs([(self.buffer.ctypes.data, size, 0)], "DRAM"))
        self.agent.add_remote_agent(self.peer.metadata)
        self.peer.ask(do="load", metadata=self.agent.get_agent_metadata().hex())
        self.agent.make_connection("peer")

    def request(self, operation, rows):
        """rows: N x 3 of local offset, remote offset, length."""
        local = np.column_stack([rows[:, 0] + self.buffer.ctypes.data, rows[:, 2], np.zeros(len(rows), np.uint64)])
        remote = np.column_stack([rows[:, 1] + self.peer.address, rows[:, 2], np.zeros(len(rows), np.uint64)])
        descs = [self.agent.get_xfer_descs(np.ascontiguousarray(side.astype(np.uint64)), "DRAM") for side in (local, remote)]
        return self.agent.initialize_xfer(operation, descs[0], descs[1], "peer")

    def check(self):
        """WRITE and READ bring the right bytes; anything else ends the benchmark."""
        size = self.buffer.nbytes
        self.buffer[:] = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
        expected = int(self.buffer.view(np.uint64).sum())
        whole = np.array([[0, 0, size]], dtype=np.uint64)
        write = self.request("WRITE", whole)
        run_transfer(self.agent, write)
        if self.peer.ask(do="sum", bytes=size)["sum"] != expected:
            raise RuntimeError("WRITE brought wrong bytes to the peer")
        self.buffer[:] = 0
        read = self.request("READ", whole)
        run_transfer(self.agent, read)
        if int(self.buffer.view(np.uint64).sum()) != expected:
            raise RuntimeError("READ brought wrong bytes back")
        write.release()
        read.release()

    def close(self):
        self.agent.remove_remote_agent("peer")
        self.agent.deregister_memory(self.registered)
        self.peer.close()


# ---- groups ----


def ours_network(pair):
    order = np.random.default_rng(1).permutation(10_000).astype(np.uint64)
    index = np.arange(10_000, dtype=np.uint64)
    piece = np.uint64(16 << 10)
    cases = {
        "latency_64_s": ("WRITE", np.array([[0, 64, 64]], dtype=np.uint64), 5, 400),
        "write_256m_s": ("WRITE", np.array([[0, 0, BYTES]], dtype=np.uint64), 5, 1),
        "read_256m_s": ("READ", np.array([[0, 0, BYTES]], dtype=np.uint64), 5, 1),
        "list_16k_s": ("WRITE", np.column_stack([index * piece, order * piece, np.full(10_000, piece)]), 5, 1),
    }
    figures = {}
    for name, (operation, rows, repetitions, inner) in cases.items():
        handle = pair.request(operation, rows)
        run_transfer(pair.agent, handle)

        def body(handle=handle, inner=inner):
            for _ in range(inner):
                run_transfer(pair.agent, handle)

        figures[name] = best(repetitions, body) / inner
        if name == "write_256m_s":
            figures["path"] = pair.agent.query_xfer_path(handle)
        handle.release()
    return figures


def network(rounds=5):
    raw, ours = [], []
    with contextlib.closing(Pair(BYTES, backend_params=NETWORK)) as pair:
        pair.check()
        for _ in range(rounds):  # alternating: each ratio is of neighbours in time, and the median drops what disturbed one
            raw.append(raw_ucx(UCX_TLS="tcp", UCX_NET_DEVICES=DEVICE))
            ours.append(ours_network(pair))
    path = ours[0]["path"]

    def beside_raw(name, key, must, note="", **options):
        by_time = sorted(range(rounds), key=lambda i: ours[i][key] / raw[i][key])
        middle = by_time[rounds // 2]
        note = "; ".join(text for text in (note, f"median of {rounds} pairs") if text)
        return ratio(name, ours[middle][key], raw[middle][key], "raw UCX", must, note=note, **options)

    return [
        beside_raw("network WRITE 256 MiB", "write_256m_s", 0.95, path),
        beside_raw("network READ 256 MiB", "read_256m_s", 0.95, path),
        beside_raw("network latency 64 B WRITE", "latency_64_s", 1.3, higher_is_better=False),
        beside_raw("network 10,000 x 16 KiB WRITE", "list_16k_s", 0.9),
        Figure("network READ beside WRITE, 256 MiB", statistics.median(o["write_256m_s"] / o["read_256m_s"] for o in ours),
               "of WRITE", higher_is_better=True),
    ]


def shared(rounds=5):
    """What one thread of num_threads brings over the network path, requests in turn with and without it."""
    with contextlib.ExitStack() as stack:
        pairs = []
        for threads in ("0", "1"):
            params = {"UCX": {**NETWORK["UCX"], "num_threads": threads}}
            pairs.append(stack.enter_context(contextlib.closing(Pair(BYTES, backend_params=params))))
            pairs[-1].check()
        runs = [[ours_network(pair) for pair in pairs] for _ in range(rounds)]
    return [Figure(f"num_threads=1, {what}", statistics.median(without[key] / with_one[key] for without, with_one in runs),
                   "of num_threads=0", higher_is_better=True)
            for key, what in (("write_256m_s", "WRITE 256 MiB"), ("read_256m_s", "READ 256 MiB"), ("list_16k_s", "10,000 x 16 KiB"))]


def round_trips(pair, count):
    """Microseconds of each of `count` notification round trips."""
    pair.peer.ask(do="echo", count=count, to="initiator")
    agent, samples = pair.agent, []
    for _ in range(count):
        start = time.perf_counter_ns()
        agent.send_notif("peer", b"12345678")
        while not agent.get_new_notifs():
            pass
        samples.append((time.perf_counter_ns() - start) / 1e3)
    return samples


def round_trip_asleep(pair):
    """Microseconds of one round trip between two agents whose programs and progress threads all sleep."""
    pair.peer.ask(do="echo_asleep", count=1, to="initiator")
    time.sleep(0.02)
    start = time.perf_counter_ns()
    pair.agent.send_notif("peer", b"12345678")
    asleep_until_message(pair.agent)
    return (time.perf_counter_ns() - start) / 1e3


def pipe_round_trips(count):
    """Microseconds of single round trips between two processes that sleep in read() on pipes: two wake-ups each."""
    code = "import os\nwhile message := os.read(0, 8):\n    os.write(1, message)"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    there, back, samples = other.stdin.fileno(), other.stdout.fileno(), []
    for _ in range(count + 1):
        time.sleep(0.02)
        start = time.perf_counter_ns()
        os.write(there, b"12345678")
        os.read(back, 8)
        samples.append((time.perf_counter_ns() - start) / 1e3)
    other.stdin.close()
    other.wait(DEADLINE_S)
    return samples[1:]  # the first waits for the interpreter


def notifications():
    figures = []
    for name, must, goal, options in (("default", 20, 8, {}), ("both polling", 4, 1.5, {"enable_prog_thread": False})):
        with contextlib.closing(Pair(4096, **options)) as pair:
            round_trips(pair, 200)
            samples = round_trips(pair, 2000)
            first = []
            if not options:
                pair.agent.event_fd()
                first = [round_trip_asleep(pair) for _ in range(21)]
        note = f"p99 {sorted(samples)[int(0.99 * len(samples))]:.1f}"
        figures.append(Figure(f"notification round trip 8 B, {name}", statistics.median(samples), "us", must, goal, note=note))
        if first:
            figures.append(Figure("notification round trip, first after idle", statistics.median(first), "us", 150,
                                  beside={"two wake-ups by pipes": statistics.median(pipe_round_trips(21))},
                                  note="both sides asleep on event_fd()"))
    return figures


def idle():
    with contextlib.closing(Pair(4096)) as pair:
        time.sleep(0.3)
        share = pair.peer.ask(do="cpu", seconds=2)["share"]
    return [Figure("CPU of an idle agent, default configuration", 100 * share, "% core", 1, 0.1)]


def descriptors():
    agent = make_agent("local")
    table = np.column_stack([np.arange(MILLION, dtype=np.uint64) * np.uint64(8192) + np.uint64(1 << 40),
                             np.full(MILLION, 4096, np.uint64), np.zeros(MILLION, np.uint64)])
    table = np.ascontiguousarray(table)
    tuples = [tuple(row) for row in table.tolist()]
    copy_ms = 1e3 * best(5, table.copy)
    from_numpy = 1e3 * best(5, lambda: agent.get_xfer_descs(table, "DRAM"))
    from_tuples = 1e3 * best(3, lambda: agent.get_xfer_descs(tuples, "DRAM"))
    descs = agent.get_xfer_descs(table, "DRAM")
    stored = agent.get_serialized_descs(descs)
    if agent.deserialize_descs(stored) != descs:
        raise RuntimeError("a list of a million descriptors did not survive serialisation")
    serialise = 1e3 * best(3, lambda: agent.get_serialized_descs(descs))
    deserialise = 1e3 * best(3, lambda: agent.deserialize_descs(stored))
    beside = {"numpy copy": copy_ms}
    return [
        Figure("10^6 descriptors from numpy", from_numpy, "ms", 10, 4, beside),
        Figure("10^6 descriptors from tuples", from_tuples, "ms", 60, 40, beside),
        Figure("10^6 descriptors serialised", serialise, "ms", 12, 5, beside),
        Figure("10^6 descriptors deserialised", deserialise, "ms", 8, 3, beside),
        *prepared(),
    ]


def prepared():
    count, piece = 100_000, 256
    with contextlib.closing(Pair(2 * count * piece)) as pair:
        rows = np.zeros((count, 3), dtype=np.uint64)
        rows[:, 0] = np.arange(count, dtype=np.uint64) * np.uint64(2 * piece)  # gaps: nothing can be merged
        rows[:, 1] = piece
        local, remote = rows.copy(), rows.copy()
        local[:, 0] += np.uint64(pair.buffer.ctypes.data)
        remote[:, 0] += np.uint64(pair.peer.address)
        agent = pair.agent
        descs = agent.get_xfer_descs(remote, "DRAM")
        ours = agent.prep_xfer_dlist("", agent.get_xfer_descs(local, "DRAM"))
        theirs = agent.prep_xfer_dlist("peer", descs)
        order = np.random.default_rng(1).permutation(count).astype(np.int32)
        index = np.arange(count, dtype=np.int32)
        prepare = 1e3 * best(7, lambda: agent.prep_xfer_dlist("peer", descs).release())
        make = 1e3 * best(7, lambda: agent.make_prepped_xfer("WRITE", ours, index, theirs, order).release())
        ours.release()
        theirs.release()
    return [Figure("prepare 100,000 descriptors", prepare, "ms", 0.25, 0.1),
            Figure("make a request of 100,000, scattered", make, "ms", 1, 0.4)]


def in_fresh_python(code, repetitions):
    """The least of what `code` prints in a new interpreter."""
    values = []
    for _ in range(repetitions):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=DEADLINE_S)
        values.append(float(out.stdout.split()[-1]))
    return min(values)


def setup():
    imported = 1e3 * in_fresh_python("import time; t = time.perf_counter(); import nixl; print(time.perf_counter() - t)", 5)
    numpy_alone = 1e3 * in_fresh_python("import time; t = time.perf_counter(); import numpy; print(time.perf_counter() - t)", 5)
    agent_code = ("import time, nixl; c = nixl.nixl_agent_config(backends=['UCX']); t = time.perf_counter(); "
                  "a = nixl.nixl_agent('a', c); u = time.perf_counter(); b = nixl.nixl_agent('b', c); v = time.perf_counter(); "
                  "print({})")
    first = in_fresh_python(agent_code.format("u - t"), 5)
    second = 1e3 * in_fresh_python(agent_code.format("v - u"), 5)
    raw = min(floor("raw_ucx", "open")["open_s"] for _ in range(5))
    return [
        Figure("import nixl", imported, "ms", 100, 50, {"import numpy": numpy_alone}),
        ratio("first agent with UCX", first, raw, "ucp_init + worker as UCX comes", 1.3, 1.1, higher_is_better=False),
        Figure("second agent with UCX", second, "ms", 25, 10),
        *loading(),
    ]


def loading():
    """add_remote_agent of a new peer, by the number of regions in its metadata."""
    figures = []
    for count, must, goal in ((1, 2, 0.5), (1000, 0.7, 0.3)):
        owner = make_agent("owner")
        buffer = np.zeros(count * 8192, dtype=np.uint8)
        owner.register_memory([(buffer.ctypes.data + i * 8192, 4096, 0, "") for i in range(count)], "DRAM")
        metadata = owner.get_agent_metadata()
        reader, times = make_agent("reader"), []
        for _ in range(21):
            start = time.perf_counter()
            reader.add_remote_agent(metadata)
            times.append(time.perf_counter() - start)
            reader.remove_remote_agent("owner")
        text = "1 region" if count == 1 else f"{count:,} regions"
        figures.append(Figure(f"add_remote_agent, {text}", 1e3 * min(times), "ms", must, goal))
    return figures


GROUPS = {"network": network, "shared": shared, "notifications": notifications, "idle": idle, "descriptors": descriptors, "setup": setup}


def main():
    arguments = parse_arguments(__doc__)
    if program("raw_ucx") is None:
        sys.exit("raw_ucx is missing: build it with ./run build dev (NIXL_BUILD_BENCHMARKS=ON)")
    figures = []
    for name, group in GROUPS.items():
        if arguments.only in name:
            print(f"[bench] {name}", file=sys.stderr)
            figures += group()
    method = ("Times are the best, those of notifications the median of the repetitions; two processes of this host; "
              "network: both sides over TCP on loopback, pairs of runs of raw UCX and ours, the pair of the median ratio.")
    return report("nixl agent", figures, method, arguments)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--peer":
        peer_main()
    else:
        sys.exit(main())
