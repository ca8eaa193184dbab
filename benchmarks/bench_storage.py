#!/usr/bin/env python3
"""Storage: POSIX beside fio and dd, objects beside curl and boto3, all in this run.

Files: 256 MiB in --folder, written and read in turns by each program, best of --rounds (O_DIRECT: median of the rounds' ratios),
with the same offsets, block and depth. Beside fio and dd, which use one block of memory again and again and so have it in the processor's cache, ours uses one
for each of its two threads; "whole memory" rows use 256 MiB of memory, beside a plain loop of calls over the same. Ours is the
quicker of polling and waiting; O_DIRECT rows have no progress thread, so that one thread does the work as in fio. Objects: 64 of
8 MiB against a server on this host that throws away what it is sent; its own limit is measured with a client that does nothing
else, and a ratio counts where that is at least twice as quick; no client computes checksums, each has up to 16 connections.
"""

import concurrent.futures
import ctypes
import json
import mmap
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads spin for a while

import numpy  # noqa: E402
import nixl  # noqa: E402
from object_servers import SinkServer  # noqa: E402
from utils.figures import Figure, parse_arguments, report  # noqa: E402

TOTAL = 256 << 20
DEPTH = 64
OBJECTS, OBJECT_BYTES = 64, 8 << 20
CONNECTIONS = 16
THREADS = 2


def best(rounds, *runs):
    """Least seconds of each run, taken in turns."""
    seconds = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            seconds[i] = min(seconds[i], run())
    return seconds


def paired(rounds, ours, theirs):
    """(median of the ratios of speed, our least seconds, theirs), each round having two of ours and, between them, two of theirs:
    a disk's speed drifts while others use it."""
    pairs = []
    for _ in range(rounds):
        mine, other = zip(*[(run(), theirs()) for run in ours])
        pairs.append((min(mine), min(other)))
    return statistics.median(other / mine for mine, other in pairs), *map(min, zip(*pairs))


def gb(seconds, bytes_=TOTAL):
    return bytes_ / seconds / 1e9


class Ours:
    """One prepared list of transfers between memory and a file; run() gives the seconds of one pass."""

    def __init__(self, path, operation, block, *, direct=False, random=False, gap=False, one_block=False, progress=True, **params):
        self.agent = nixl.nixl_agent("bench", nixl.nixl_agent_config(enable_prog_thread=progress, backends=[]))
        self.agent.create_backend("POSIX", {key: str(value) for key, value in params.items()})
        self.memory = mmap.mmap(-1, TOTAL * (2 if gap else 1))
        array = numpy.frombuffer(self.memory, dtype=numpy.uint8)
        array[:] = 7
        self.agent.register_memory([array])
        self.agent.register_memory([(0, 0, 1, f"rw{',direct' if direct else ''}:{path}")], "FILE")
        count = TOTAL // block
        place = numpy.arange(count, dtype=numpy.uint64)
        place = place % THREADS if one_block else place * 2 if gap else place
        near = array.ctypes.data + place * numpy.uint64(block)
        far = numpy.arange(count, dtype=numpy.uint64) * block
        if random:
            numpy.random.default_rng(1).shuffle(far)
        sizes, zeros = numpy.full(count, block, numpy.uint64), numpy.zeros(count, numpy.uint64)
        local = self.agent.get_xfer_descs(numpy.stack([near, sizes, zeros], axis=1), "DRAM")
        remote = self.agent.get_xfer_descs(numpy.stack([far, sizes, zeros + numpy.uint64(1)], axis=1), "FILE")
        self.handle = self.agent.initialize_xfer(operation, local, remote, "bench")
        self.path = self.agent.query_xfer_path(self.handle)

    def polling(self):
        transfer, check, handle = self.agent.transfer, self.agent.check_xfer_state, self.handle
        begin = time.perf_counter()
        state = transfer(handle)
        while state == "PROC":
            state = check(handle)
        return time.perf_counter() - begin

    def waiting(self):
        begin = time.perf_counter()
        if self.agent.transfer(self.handle) != "DONE":
            self.handle.wait()
        return time.perf_counter() - begin

    def runs(self):
        return self.polling, self.waiting


def fio(path, operation, block, engine, direct=False, random=False):
    def run():
        kind = ("rand" if random else "") + operation.lower()
        done = subprocess.run(
            ["fio", "--name=x", f"--filename={path}", f"--size={TOTAL}", f"--bs={block}", f"--rw={kind}", f"--ioengine={engine}",
             f"--iodepth={DEPTH}", f"--direct={int(direct)}", "--invalidate=0", "--randrepeat=1", "--output-format=json",
             f"--loops={1 if direct else 4}", "--overwrite=1"], capture_output=True, text=True, check=True)
        job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0][operation.lower()]
        return TOTAL / (job["io_bytes"] / max(job["runtime"], 1) * 1000)
    return run


def plain(path, operation):
    """A loop of calls of 1 MiB over 256 MiB of memory."""
    fd, memory = os.open(path, os.O_RDWR), memoryview(mmap.mmap(-1, TOTAL))
    memory[::4096] = bytes(TOTAL // 4096)
    parts = [(memory[at:at + (1 << 20)], at) for at in range(0, TOTAL, 1 << 20)]
    call = os.pwrite if operation == "WRITE" else lambda fd, part, at: os.preadv(fd, [part], at)

    def run():
        begin = time.perf_counter()
        for part, at in parts:
            call(fd, part, at)
        return time.perf_counter() - begin
    return run


def dd(path, operation, block):
    count = TOTAL // block
    words = {"WRITE": ["if=/dev/zero", f"of={path}", "conv=notrunc"], "READ": [f"if={path}", "of=/dev/null"]}[operation]

    def run():
        done = subprocess.run(["dd", *words, f"bs={block}", f"count={count}"], capture_output=True, text=True, check=True,
                              env={**os.environ, "LC_ALL": "C"})
        return float(done.stderr.split(" copied, ")[1].split(" s")[0])
    return run


def relative(name, ours, neighbours, must, goal, note=""):
    """Ours against the quickest neighbour, as a ratio of speeds. `ours` and `neighbours`: GB/s."""
    top = max(neighbours, key=neighbours.get)
    shown = {"ours": ours, **neighbours}
    return Figure(name, ours / neighbours[top], f"of {top}", must, goal, {f"{k} GB/s": v for k, v in shown.items()}, True, note)


def buffered(path, rounds):
    figures = []
    for operation in ("WRITE", "READ"):
        one = Ours(path, operation, 1 << 20, one_block=True)
        *ours, by_fio, by_dd = best(rounds, *one.runs(), fio(path, operation, 1 << 20, "psync"), dd(path, operation, 1 << 20))
        figures.append(relative(f"buffered 1 MiB {operation.lower()}", gb(min(ours)), {"fio": gb(by_fio), "dd": gb(by_dd)}, 1.0, 1.05, one.path))
    for operation in ("WRITE", "READ"):
        one = Ours(path, operation, 1 << 20)
        *ours, by_loop = best(rounds, *one.runs(), plain(path, operation))
        figures.append(relative(f"buffered 1 MiB {operation.lower()}, whole memory", gb(min(ours)), {"plain calls": gb(by_loop)}, None, 1.05, one.path))
    # On the reference machine the must is 3.5 (write) and 4.5 GB/s (read) where dd makes 1.45 and 4.4.
    for operation, must, goal in (("WRITE", 3.5 / 1.45, 4.5 / 1.45), ("READ", 4.5 / 4.4, 6 / 4.4)):
        one = Ours(path, operation, 4096, one_block=True)
        *ours, by_dd, by_fio = best(rounds, *one.runs(), dd(path, operation, 4096), fio(path, operation, 4096, "psync"))
        figures.append(Figure(f"buffered 4 KiB {operation.lower()}", by_dd / min(ours), "of dd", must, goal,
                              {"ours GB/s": gb(min(ours)), "dd GB/s": gb(by_dd), "fio GB/s": gb(by_fio)}, True, one.path))
    return figures


def overhead(path, rounds):
    """What a list of 4 KiB pieces costs above the same bytes in pieces of 1 MiB, per piece."""
    whole, pieces = Ours(path, "READ", 1 << 20), Ours(path, "READ", 4096, gap=True)
    big, small = (min(pair) for pair in zip(*[iter(best(rounds, *whole.runs(), *pieces.runs()))] * 2))
    return [Figure("descriptor overhead, 4 KiB", (small - big) / (TOTAL // 4096) * 1e6, "us", 1.0, 0.5, {"list ms": small * 1e3, "1 MiB ms": big * 1e3})]


def direct(path, rounds):
    figures = []
    for engine, param in (("libaio", "use_aio"), ("io_uring", "use_uring")):
        for operation in ("WRITE", "READ"):
            try:
                one = Ours(path, operation, 4096, direct=True, random=True, progress=False, kernel_queue_size=DEPTH, **{param: "true"})
                ratio, ours, by_fio = paired(rounds, one.runs(), fio(path, operation, 4096, engine, direct=True, random=True))
            except (nixl.nixlBackendError, subprocess.CalledProcessError) as error:
                figures.append(Figure(f"O_DIRECT 4 KiB {operation.lower()}, {engine}", 0, "of fio", None, None, {}, True, f"not run: {error}"))
                continue
            figures.append(Figure(f"O_DIRECT 4 KiB random {operation.lower()}, {engine}", ratio, "of fio", 0.95, 1.0,
                                  {"best: ours GB/s": gb(ours), "fio GB/s": gb(by_fio)}, True, f"depth {DEPTH}, median of {rounds} pairs"))
    return figures


class OurObjects:
    def __init__(self, server, operation):
        self.agent = nixl.nixl_agent("bench", nixl.nixl_agent_config(backends=[]))
        self.agent.create_backend("OBJ", {**server.params(), "num_threads": str(THREADS), "req_checksum": "required", "resp_checksum": "required"})
        self.array = numpy.zeros(OBJECTS * OBJECT_BYTES, numpy.uint8)
        self.array[:] = 9
        self.agent.register_memory([self.array])
        self.agent.register_memory([(0, 0, i, f"o{i}") for i in range(OBJECTS)], "OBJ")
        near = [(self.array.ctypes.data + i * OBJECT_BYTES, OBJECT_BYTES, 0) for i in range(OBJECTS)]
        far = [(0, OBJECT_BYTES, i) for i in range(OBJECTS)]
        self.handle = self.agent.initialize_xfer(operation, self.agent.get_xfer_descs(near, "DRAM"), self.agent.get_xfer_descs(far, "OBJ"), "bench")

    def run(self):
        begin = time.perf_counter()
        if self.agent.transfer(self.handle) != "DONE":
            self.handle.wait()
        return time.perf_counter() - begin


def curl(server, operation, folder):
    lines, names = [], []
    for i in range(OBJECTS):
        name = os.path.join(folder, f"o{i}")
        names.append(name)
        if operation == "WRITE":
            lines += [f'upload-file = "{name}"', f'url = "{server.endpoint}/bucket/o{i}"']
        else:
            lines += [f'url = "{server.endpoint}/bucket/o{i}"', 'output = "/dev/null"']
    config = os.path.join(folder, f"curl_{operation}")
    pathlib.Path(config).write_text("\n".join(lines))

    def run():
        begin = time.perf_counter()
        subprocess.run(["curl", "-sS", "--fail", "-Z", "--parallel-immediate", "--parallel-max", str(CONNECTIONS), "-K", config], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - begin
    return run


def boto3(server, operation, body):
    import boto3 as library
    from botocore.config import Config

    client = library.client("s3", endpoint_url=server.endpoint, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1",
                            config=Config(max_pool_connections=CONNECTIONS, request_checksum_calculation="when_required",
                                          response_checksum_validation="when_required", s3={"addressing_style": "path", "payload_signing_enabled": False}))

    def one(i):
        if operation == "WRITE":
            client.put_object(Bucket="bucket", Key=f"o{i}", Body=body)
        else:
            client.get_object(Bucket="bucket", Key=f"o{i}")["Body"].read()

    def run():
        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(one, range(OBJECTS)))
        return time.perf_counter() - begin
    return run


def objects(rounds):
    figures = []
    programs = sorted(ROOT.glob("build/*/benchmarks/floor/object_sink"))
    if not programs:
        return [Figure("S3", 0, "of the better", None, None, {}, True, "not run: object_sink is not built (./run build)")]
    server = SinkServer(programs[0], OBJECT_BYTES)
    body = server.pattern()
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        for i in range(OBJECTS):
            pathlib.Path(folder, f"o{i}").write_bytes(body)
        with server:
            for operation, name in (("WRITE", "PUT"), ("READ", "GET")):
                one = OurObjects(server, operation)
                before = server.counted()
                ours, by_curl, by_boto3, null = best(rounds, one.run, curl(server, operation, folder), boto3(server, operation, body),
                                                      lambda name=name: min(server.null_client(name, OBJECTS, n) for n in (4, CONNECTIONS)))
                if operation == "WRITE" and server.counted() - before != 5 * rounds * OBJECTS * OBJECT_BYTES:
                    raise RuntimeError("the server did not get every byte")
                if operation == "READ" and not numpy.array_equal(one.array[-OBJECT_BYTES:], numpy.frombuffer(body, numpy.uint8)):
                    raise RuntimeError("wrong bytes were read")
                size = OBJECTS * OBJECT_BYTES
                neighbours = {"curl": gb(by_curl, size), "boto3": gb(by_boto3, size)}
                # Where the server itself is hardly quicker than its clients, a ratio says nothing about them.
                counts = gb(null, size) >= 2 * max(neighbours.values())
                note = f"null client {gb(null, size):.1f} GB/s" + ("" if counts else ": the server is the bottleneck, not judged")
                figures.append(relative(f"S3 {name} 64 x 8 MiB", gb(ours, size), neighbours, 0.9 if counts else None, 1.1, note))
    finally:
        shutil.rmtree(folder)
    return figures


def main():
    def flags(parser):
        parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the file lies (a disk, not memory, for O_DIRECT)")
        parser.add_argument("--rounds", type=int, default=5)

    arguments = parse_arguments(__doc__, flags)
    missing = [program for program in ("fio", "dd", "curl") if not shutil.which(program)]
    if missing:
        print(f"SKIP: storage: baselines missing: {', '.join(missing)}")
        return 77
    fd, path = tempfile.mkstemp(prefix="nixl_bench_", dir=arguments.folder)
    ctypes.CDLL(None).posix_fallocate(fd, ctypes.c_long(0), ctypes.c_long(TOTAL))
    os.close(fd)
    groups = {"buffered": lambda: buffered(path, arguments.rounds), "overhead": lambda: overhead(path, arguments.rounds),
              "direct": lambda: direct(path, arguments.rounds), "objects": lambda: objects(arguments.rounds)}
    figures = []
    try:
        Ours(path, "WRITE", 1 << 20).waiting()
        for name, group in groups.items():
            if arguments.only in name:
                figures += group()
    finally:
        os.unlink(path)
    return report("Storage", figures, " ".join(__doc__.split("\n\n")[1].split()), arguments)


if __name__ == "__main__":
    sys.exit(main())
