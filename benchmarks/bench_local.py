"""./run bench local: transfers between two processes of this host, host memory and (where there are two GPUs) GPU memory.

Every figure is the best of several rounds, taken between two runs of the floor programs of the same round, after the bytes
were checked. Musts and goals are kept as ratios to a neighbour of the same run: process_vm_writev ("cma") or memcpy for host
memory, the copy engine for GPUs; the table shows them multiplied out. Exit code 0 only if every must is met.
"""

import base64
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")

import numpy  # noqa: E402

from utils.floor import floor, nccl, raw_ucx  # noqa: E402
from utils.figures import Figure, parse_arguments, report  # noqa: E402
from utils.helper_process import HelperProcess  # noqa: E402
from utils.memory import INITIATOR_FILL, TARGET_FILL, DeviceBuffer, HostBuffer, LockedBuffer, TorchBuffer, pattern, torch_has_cuda  # noqa: E402

BYTES = 400 << 20
ROUNDS = 3
# name, pieces, bytes of one, unit, neighbour in the floor's output, must and goal as multiples of it, seconds a round, repetitions a turn
COPIES = [
    ("64 B", 1, 64, "us", "cma 64", 2.2 / 1.5, 1.7 / 1.5, 0.3, 100),
    ("64 KiB", 1, 64 << 10, "us", "cma 65536", 7.5 / 6, 6.5 / 6, 0.5, 50),
    ("1 MiB", 1, 1 << 20, "us", "cma 1048576", 86 / 83, 45 / 83, 2, 20),
    ("256 MiB", 1, 256 << 20, "ms", "memcpy 268435456", 26 / 19.5, 20 / 19.5, 2, 1),
    ("10,000 x 16 KiB", 10_000, 16 << 10, "ms", "memcpy 10000x16384", 20 / 14.5, 16 / 14.5, 2, 1),
    ("100,000 x 4 KiB", 100_000, 4 << 10, "ms", "cma 100000x4096", 105 / 92, 60 / 92, 2, 1),
]
# What raw UCX, left to choose its transport, does of that.
RAW_UCX = {("64 B", "WRITE"): "latency_64_s", ("256 MiB", "WRITE"): "write_256m_s", ("256 MiB", "READ"): "read_256m_s",
           ("10,000 x 16 KiB", "WRITE"): "list_16k_s"}
GPU_BYTES = 1 << 30
# name, pieces, bytes of one, must and goal in GB/s where the copy engine gives 393
GPU_COPIES = [
    ("1 x 1 GiB", 1, 1 << 30, 370, 390),
    ("1,000 x 64 KiB", 1000, 64 << 10, 300, 345),
    ("10,000 x 16 KiB", 10_000, 16 << 10, 320, 360),
    ("100,000 x 4 KiB", 100_000, 4 << 10, 320, 365),
    ("100,000 x 1 KiB", 100_000, 1 << 10, 250, 340),
]
# Host memory on one side, GPU memory on the other: name, pieces, bytes of one, must and goal as parts of what the copy
# engine gives from page-locked memory. The must is for the paths without staging.
MIXED_BYTES = 256 << 20
MIXED_COPIES = [
    ("1 MiB", 1, 1 << 20, None, None),
    ("1 x 256 MiB", 1, 256 << 20, 0.9, 0.98),
    ("1,000 x 64 KiB", 1000, 64 << 10, 0.7, 0.9),
    ("10,000 x 16 KiB", 10_000, 16 << 10, 0.8, 0.95),
    ("50,000 x 4 KiB", 50_000, 4 << 10, 0.8, 0.95),
]
SCALE = {"us": 1e6, "ms": 1e3}
# A fresh process: the CUDA context that a program has in any case, then its first agent.
CREATION = """
import json, time, nixl
from utils.memory import Cuda
times = [time.perf_counter()]
Cuda.get().use(0)
times.append(time.perf_counter())
agent = nixl.nixl_agent("creation", nixl.nixl_agent_config(backends=["UCX"]))
times.append(time.perf_counter())
print(json.dumps({"context": times[1] - times[0], "agent": times[2] - times[1]}))
"""


def shuffled(count, seed):
    return numpy.random.default_rng(seed).permutation(count).astype(numpy.uint64)


def table(base, order, piece, device):
    rows = numpy.empty((len(order), 3), dtype=numpy.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = order * numpy.uint64(piece) + numpy.uint64(base), piece, device
    return rows


class Pair:
    """Our agent and buffer, and a helper process with its own, of the same kind unless `near` is given."""

    def __init__(self, kind, size, prog_thread=True, near=None, **far):
        import nixl

        self.nixl, self.kind, self.size, self.far_device = nixl, kind, size, far.get("device", 0)
        if near is not None:
            self.near = near
        elif far.get("torch"):
            self.near = TorchBuffer(size, 0)
        else:
            self.near = DeviceBuffer(size, 0, far.get("vmm", False), far.get("piece")) if kind == "VRAM" else HostBuffer(size)
        self.agent = nixl.nixl_agent("initiator", nixl.nixl_agent_config(enable_prog_thread=prog_thread, backends=["UCX"]))
        self.registered = self.agent.register_memory([(self.near.address, size, 0, "")], self.near.kind)
        self.helper = HelperProcess("target", prog_thread)
        self.far_address = self.helper.ask(do="allocate", kind=kind, size=size, **far)["address"]
        self.agent.add_remote_agent(self.helper.metadata())

    def request(self, operation, count, piece):
        """A request over `count` pieces, random order on both sides, with the orders that were used."""
        near, far = shuffled(count, 1), shuffled(count, 2)
        local = self.agent.get_xfer_descs(table(self.near.address, near, piece, 0), self.near.kind)
        remote = self.agent.get_xfer_descs(table(self.far_address, far, piece, self.far_device), self.kind)
        return self.agent.initialize_xfer(operation, local, remote, "target"), near, far

    def once(self, handle):
        agent = self.agent
        start = time.perf_counter_ns()
        state = agent.transfer(handle)
        while state != "DONE":
            state = agent.check_xfer_state(handle)
        return (time.perf_counter_ns() - start) / 1e9

    def prove(self, operation, count, piece):
        """Moves a fresh pattern and compares checksums of everything that was moved."""
        size = count * piece
        self.near.write(pattern(size, 0, INITIATOR_FILL))
        self.helper.ask(do="fill", number=1, fill=TARGET_FILL)
        handle, near, far = self.request(operation, count, piece)
        self.once(handle)
        self.agent.release_xfer_handle(handle)
        ours, theirs = pattern(size, 0, INITIATOR_FILL), pattern(self.size, 1, TARGET_FILL)[:size]
        source, order, target_order = (ours, near, far) if operation == "WRITE" else (theirs, far, near)
        wanted = numpy.empty((count, piece), dtype=numpy.uint8)
        wanted[target_order] = source.reshape(count, piece)[order]
        wanted_crc = zlib.crc32(wanted.reshape(-1))
        if operation == "WRITE":
            seen = self.helper.ask(do="crc", offset=0, size=size)["crc"]
        else:
            seen = zlib.crc32(numpy.ascontiguousarray(self.near.read(0, size)))
        if seen != wanted_crc:
            raise SystemExit(f"bench local: {operation} of {count} x {piece} bytes of {self.kind} moved wrong bytes")

    def best(self, operation, count, piece, repetitions):
        handle, _, _ = self.request(operation, count, piece)
        self.once(handle)
        times = [self.once(handle) for _ in range(repetitions)]
        path = self.agent.query_xfer_path(handle)
        self.agent.release_xfer_handle(handle)
        return min(times), path

    def turns(self, count, piece, seconds, repetitions):
        """Seconds of the best WRITE and the best READ of each turn, which follow each other at once, and the path."""
        handles = {operation: self.request(operation, count, piece)[0] for operation in ("WRITE", "READ")}
        for handle in handles.values():
            self.once(handle)
        taken, end = [], time.monotonic() + seconds
        while not taken or time.monotonic() < end:
            order = sorted(handles, reverse=len(taken) % 2 == 0)
            best = {operation: min(self.once(handles[operation]) for _ in range(repetitions)) for operation in order}
            taken.append((best["WRITE"], best["READ"]))
        path = self.agent.query_xfer_path(handles["WRITE"])
        for handle in handles.values():
            self.agent.release_xfer_handle(handle)
        return taken, path

    def close(self):
        self.agent.deregister_memory(self.registered)
        self.agent.remove_remote_agent("target")
        self.helper.close()
        self.near.close()


def host_copies(figures):
    pair = Pair("DRAM", BYTES)
    for _, count, piece, *_ in COPIES:
        for operation in ("WRITE", "READ"):
            pair.prove(operation, count, piece)
    taken, floors, path = {name: [] for name, *_ in COPIES}, {}, ""
    for _ in range(ROUNDS):
        for name, value in floor("copy_floor").items():
            floors[name] = min(value, floors.get(name, value))
        for name, count, piece, _, _, _, _, seconds, repetitions in COPIES:
            new, path = pair.turns(count, piece, seconds, repetitions)
            taken[name] += new
        for name, value in floor("copy_floor").items():
            floors[name] = min(value, floors[name])
        for name, value in (raw_ucx() or {}).items():
            floors[name] = min(value, floors.get(name, value))
    for name, count, piece, unit, neighbour, must, goal, *_ in COPIES:
        scale, base = SCALE[unit], floors[neighbour]
        best = dict(zip(("WRITE", "READ"), map(min, zip(*taken[name]))))
        beside = {neighbour.split()[0]: base * scale}
        other = neighbour.replace("cma", "memcpy") if "cma" in neighbour else neighbour.replace("memcpy", "cma")
        if other in floors:
            beside[other.split()[0]] = floors[other] * scale
        for operation in ("WRITE", "READ"):
            raw = floors.get(RAW_UCX.get((name, operation)))
            figures.append(Figure(f"{operation} {name}", best[operation] * scale, unit, must * base * scale,
                                  goal * base * scale, beside | ({"raw UCX": raw * scale} if raw else {}), note=path))
        if count * piece >= 1 << 20:
            # Turn by turn, and of the turns in which the machine was at its best, as the figures above are: a core, and the memory, may
            # be a third slower for seconds, which WRITEs feel more.
            turns = sorted(taken[name], key=sum)
            ratio, ratio_of_all = (statistics.median(write / read for write, read in some)
                                   for some in (turns[:max(len(turns) // 4, 1)], turns))
            figures.append(Figure(f"READ against WRITE, {name}", max(ratio, 1 / ratio), "slower/faster", 1.05, 1.02,
                                  note=f"median of the quickest quarter of {len(turns)} turns; WRITE / READ of all: {ratio_of_all:.2f}"))
    third_process(figures, pair, 100_000, 4 << 10)
    pair.close()
    shared_copies(figures, floors)


def shared_copies(figures, floors):
    """The same into memory that its owner shares: mapped here, so that nothing but memcpy runs."""
    pair = Pair("DRAM", BYTES, shared=True)
    for name, count, piece, unit, neighbour, _, _, duration, repetitions in COPIES:
        for operation in ("WRITE", "READ"):
            pair.prove(operation, count, piece)
        taken, path = pair.turns(count, piece, duration, repetitions)
        for operation, seconds in zip(("WRITE", "READ"), map(min, zip(*taken))):
            figures.append(Figure(f"{operation} {name}, shared", seconds * SCALE[unit], unit, None, None,
                                  {neighbour.split()[0]: floors[neighbour] * SCALE[unit]}, note=path))
    pair.close()


def third_process(figures, pair, count, piece, device=0):
    """64 B transfers of a third process, from `device`, to the same peer while a long list runs."""
    third = HelperProcess("third")
    third.ask(do="allocate", kind=pair.kind, size=4096, device=device)
    third.ask(do="load", blob=base64.b64encode(pair.helper.metadata()).decode())
    handle, _, _ = pair.request("WRITE", count, piece)
    request = {"do": "small_transfers", "peer": "target", "address": pair.far_address, "device": pair.far_device,
               "kind": pair.kind, "seconds": 2.0}
    third.tell(**request)
    end = time.monotonic() + 2.2
    while time.monotonic() < end:
        pair.once(handle)
    seen = third.answer()
    pair.agent.release_xfer_handle(handle)
    third.close()
    judged = (os.cpu_count() or 1) >= 8
    where = "" if pair.kind == "DRAM" else " on its GPU" if device == 0 else " on another GPU"
    figures.append(Figure(f"64 B of a third process beside a {pair.kind} list{where}, p99", seen["p99"], "us", 100 if judged else None,
                          None, {"p50": seen["p50"]}, note="" if judged else "must holds from 8 cores on"))


def notifications(figures):
    for prog_thread, must, goal, what in ((True, 20, 8, "default"), (False, 4, 1.5, "both polling")):
        pair = Pair("DRAM", 4096, prog_thread)
        pair.helper.ask(do="load", blob=base64.b64encode(pair.agent.get_agent_metadata()).decode())
        agent, best, first = pair.agent, [], []
        for _ in range(5):
            time.sleep(0.2)
            pair.helper.tell(do="echo", peer="initiator", count=2001)
            time.sleep(0.2)
            for i in range(2001):
                start = time.perf_counter_ns()
                agent.send_notif("target", b"12345678")
                while not agent.get_new_notifs():
                    pass
                (best if i else first).append((time.perf_counter_ns() - start) / 1e3)
            pair.helper.answer()
        best.sort()
        figures.append(Figure(f"notification round trip 8 B, {what}", best[len(best) // 2], "us", must, goal,
                              {"least": best[0], "first": min(first)}))
        pair.close()


def idle_cpu(figures):
    helper = HelperProcess("idle")
    time.sleep(0.5)
    before, start = helper.cpu_ns(), time.monotonic_ns()
    time.sleep(3)
    percent = 100 * (helper.cpu_ns() - before) / (time.monotonic_ns() - start)
    figures.append(Figure("CPU of an idle agent, default", percent, "% of a core", 1, 0.1))
    helper.close()


def creation(figures):
    """The first agent of a process that has a CUDA context."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    runs = [json.loads(subprocess.run([sys.executable, "-c", CREATION], env=environment, stdout=subprocess.PIPE, text=True,
                                      check=True, timeout=60).stdout.splitlines()[-1]) for _ in range(3)]
    opened = floor("raw_ucx", "open")
    beside = {"the context": min(run["context"] for run in runs) * 1e3}
    if opened:
        beside["ucp_init + worker as UCX comes"] = opened["open_s"] * 1e3
    figures.append(Figure("agent creation beyond the CUDA context", min(run["agent"] for run in runs) * 1e3, "ms", 150, 50, beside))


def gpu_copies(figures, blocks):
    probe = floor("list_copy_floor", str(blocks))
    if probe is None:
        raise SystemExit("bench local: build/.../benchmarks/floor/list_copy_floor was not built (it needs nvcc)")
    far_device = 1 if probe["devices"] > 1 else 0
    ceiling = {operation: probe[f"engine {operation}"] for operation in ("WRITE", "READ")}
    by_nccl = (nccl() if far_device else None) or {}
    # Expandable segments: torch's own where it has CUDA, else laid out alike.
    expandable = {"torch": True} if torch_has_cuda() else {"vmm": True, "piece": 20 << 20}
    for what, memory in (("plain", {}), ("virtual", {"vmm": True}), ("expandable", expandable)):
        pair = Pair("VRAM", GPU_BYTES, device=far_device, **memory)
        for name, count, piece, must, goal in GPU_COPIES:
            best = {}
            for operation in ("WRITE", "READ"):
                pair.prove(operation, count, piece)
                seconds, path = pair.best(operation, count, piece, 15)
                best[operation] = count * piece / seconds / 1e9
                share = ceiling[operation] / 393
                plain = probe[f"{count}x{piece} {operation}"]
                beside = {"copy engine": ceiling[operation], "plain kernel": plain}
                if f"{count}x{piece}" in by_nccl:
                    beside["NCCL"] = by_nccl[f"{count}x{piece}"]
                figures.append(Figure(f"VRAM {operation} {name}, {what}", best[operation], "GB/s", must * share, goal * share,
                                      beside, True, path))
                figures.append(Figure(f"  against the plain kernel, {operation} {name}, {what}", best[operation] / plain, "x",
                                      0.95, 1.0, higher_is_better=True))
            quick, slow = max(best.values()), min(best.values())
            figures.append(Figure(f"  READ against WRITE, {name}, {what}", quick / slow, "faster/slower", 1.05, 1.02))
        if what == "plain":
            gpu_requests(figures, pair)
            small_gpu_copies(figures, pair)
            for device in sorted({0, min(2, num_gpus() - 1)}):
                third_process(figures, pair, 100_000, 4 << 10, device)
        pair.close()


def mixed_copies(figures):
    """Host memory of one process, GPU memory of the other."""
    link = floor("host_link_floor")
    if link is None:
        raise SystemExit("bench local: build/.../benchmarks/floor/host_link_floor was not built (it needs nvcc)")
    far_device = 1 if link["devices"] > 1 else 0
    figures.append(Figure("page-locking 256 MiB", link["lock_ms"], "ms", beside={"unlocking": link["unlock_ms"]}))
    cases = (
        ("locked DRAM, peer's VRAM", lambda: LockedBuffer(MIXED_BYTES, far_device), "VRAM", {"device": far_device}, True),
        ("VRAM, peer's memory file", lambda: DeviceBuffer(MIXED_BYTES, 0), "DRAM", {"shared": True}, True),
        # Not locked by us; UCX does so with what is registered once the process has a CUDA context.
        ("DRAM, peer's VRAM", lambda: HostBuffer(MIXED_BYTES), "VRAM", {"device": far_device}, True),
        ("VRAM, peer's DRAM", lambda: DeviceBuffer(MIXED_BYTES, 0), "DRAM", {}, True),
        ("DRAM, peer's VRAM, direct copies off", lambda: HostBuffer(MIXED_BYTES), "VRAM", {"device": far_device}, False),
    )
    for what, make_near, far_kind, far, direct in cases:
        if not direct:
            os.environ["NIXL_SAME_HOST_DIRECT"] = "n"  # for agents made from here on: the last case
        pair = Pair(far_kind, MIXED_BYTES, near=make_near(), **far)
        near_is_host = far_kind == "VRAM"
        for operation in ("WRITE", "READ"):
            pair.prove(operation, 10_000, 16 << 10)
        for name, count, piece, must, goal in MIXED_COPIES:
            for operation in ("WRITE", "READ"):
                seconds, path = pair.best(operation, count, piece, 10)
                way = "H2D" if near_is_host == (operation == "WRITE") else "D2H"
                engine = link[f"GPU {far_device if near_is_host else 0} {way}"]
                judged = must is not None and not path.startswith("staged")
                figures.append(Figure(f"{what}: {operation} {name}", count * piece / seconds / 1e9, "GB/s", must * engine if judged else None,
                                      goal * engine if judged else None, {f"copy engine {way}": engine}, True, path))
        pair.close()
    os.environ.pop("NIXL_SAME_HOST_DIRECT", None)


def small_gpu_copies(figures, pair):
    for name, piece in (("64 B", 64), ("64 KiB", 64 << 10), ("1 MiB", 1 << 20)):
        for operation in ("WRITE", "READ"):
            pair.prove(operation, 1, piece)
            seconds, path = pair.best(operation, 1, piece, 1000)
            figures.append(Figure(f"VRAM {operation} {name}, one piece", seconds * 1e6, "us", note=path))


def gpu_requests(figures, pair):
    """What preparing, making and posting a list of 100,000 costs."""
    count, piece, agent, best = 100_000, 4 << 10, pair.agent, {}

    def note(name, start):
        seconds = time.perf_counter() - start
        best[name] = min(seconds, best.get(name, seconds))
        return time.perf_counter()

    near = table(pair.near.address, shuffled(count, 1), piece, 0)
    far = table(pair.far_address, shuffled(count, 2), piece, pair.far_device)
    order = numpy.arange(count)
    for _ in range(10):
        start = time.perf_counter()
        sides = (agent.prep_xfer_dlist("NIXL_INIT_AGENT", near, "VRAM"), agent.prep_xfer_dlist("target", far, "VRAM"))
        start = note("prepare both sides", start)
        handle = agent.make_prepped_xfer("WRITE", sides[0], order, sides[1], order)
        note("make the request", start)
        for _ in range(5):
            start = time.perf_counter()
            state = agent.transfer(handle)
            note("post", start)
            while state != "DONE":
                state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        for side in sides:
            agent.release_dlist_handle(side)
    for name, must, goal in (("prepare both sides", 2, 0.5), ("make the request", 2, 0.5)):
        figures.append(Figure(f"{name} of 100,000 VRAM pieces", best[name] * 1e3, "ms", must, goal))
    figures.append(Figure("post of 100,000 VRAM pieces, a piece", best["post"] * 1e9 / count, "ns", 5, 1))


def num_gpus():
    folder = pathlib.Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def main():
    arguments = parse_arguments(__doc__, lambda parser: parser.add_argument(
        "--memory", choices=("auto", "dram", "vram"), default="auto", help="auto: GPU memory too where there is a GPU"))
    figures, skipped = [], []
    groups = []
    if arguments.memory != "vram":
        groups += [("copies", host_copies), ("notifications", notifications), ("idle", idle_cpu)]
    if arguments.memory == "vram" or arguments.memory == "auto" and num_gpus():
        blocks = int(os.environ.get("NIXL_SAME_HOST_GPU_BLOCKS") or 64)
        groups += [("creation", creation), ("vram", lambda into: gpu_copies(into, blocks)), ("mixed", mixed_copies)]
    elif arguments.memory == "auto":
        skipped.append("GPU memory: no GPU (/proc/driver/nvidia/gpus is missing or empty)")
    for name, group in groups:
        if arguments.only in name:
            print(f"... {name}", file=sys.stderr, flush=True)
            group(figures)
    for reason in skipped:
        print(f"SKIP: {reason}")
    report("Transfers between processes of one host", figures, __doc__.split("\n\n")[1].replace("\n", " "), arguments)
    return 0 if all(figure.met is not False for figure in figures) and figures else 1


if __name__ == "__main__":
    sys.exit(main())
