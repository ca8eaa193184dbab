"""Storage in the benchmark frame: lanes between a buffer of ours and files, objects or volumes."""

import contextlib
import os

import numpy

from utils.benchmark_base import AgentLane, Benchmark, Failure, make_agent
from utils.config import format_size
from utils.memory import INITIATOR_FILL, TARGET_FILL, first_difference, make_buffer, pattern


class StorageLane(AgentLane):
    """`batch` pieces of `size` bytes between a slice of our buffer and places of a store.

    store.descs(start, lengths) -> (descriptors, kind); store.put(start, bytes) and store.get(start, size) reach the same bytes
    outside the timed loop.
    """

    def __init__(self, agent, options, size, near, near_offset, store, start):
        self.agent, self.options, self.size, self.near, self.near_offset = agent, options, size, near, near_offset
        self.store, self.start, self.bytes = store, start, size * options.batch_size
        self._registered = None

    def register(self):
        self._registered = self.agent.register_memory(
            [(self.near.address + self.near_offset, self.bytes, self.near.device, "")], self.near.kind)

    def deregister(self):
        self.agent.deregister_memory(self._registered)

    def open(self):
        pieces = [(self.near.address + self.near_offset + i * self.size, self.size, self.near.device)
                  for i in range(self.options.batch_size)]
        there, kind = self.store.descs(self.start, [self.size] * self.options.batch_size)
        self.handle = self.agent.initialize_xfer(self.options.operation, self.agent.get_xfer_descs(pieces, self.near.kind),
                                                 self.agent.get_xfer_descs(there, kind), self.agent.name)

    def fill(self, salt):
        self.near.write(pattern(self.bytes, self.options.pattern, INITIATOR_FILL, salt), self.near_offset)
        self.store.put(self.start, pattern(self.bytes, self.options.pattern, TARGET_FILL, salt))

    def check(self, salt):
        if self.options.operation == "WRITE":
            return first_difference(self.store.get(self.start, self.bytes),
                                    pattern(self.bytes, self.options.pattern, INITIATOR_FILL, salt))
        return first_difference(self.near.read(self.near_offset, self.bytes),
                                pattern(self.bytes, self.options.pattern, TARGET_FILL, salt))


class PlainLane(StorageLane):
    """The same pieces by pread and pwrite: what --baseline measures."""

    def register(self):
        self.view = memoryview(self.near.array)[self.near_offset:self.near_offset + self.bytes]

    def deregister(self):
        self.view = None

    def open(self):
        write = self.options.operation == "WRITE"
        self.calls = [(os.pwritev if write else os.preadv, self.view[i * self.size:(i + 1) * self.size], self.start + i * self.size)
                      for i in range(self.options.batch_size)]

    def close(self):
        self.calls = []

    def post(self):
        for call, piece, place in self.calls:
            if call(self.store.fd, [piece], place) != len(piece):
                raise Failure(f"{self.store.path}: a short read or write at offset {place}")
        return True

    def path(self):
        return "pread/pwrite"


class FileStore:
    """One file: created if absent, made longer as needed, never shorter, removed at the end only if it was created here."""

    def __init__(self, path, direct):
        self.path, self.created = path, not os.path.exists(path)
        try:
            self.plain = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        except OSError as error:
            raise Failure(f"--file_path {path}: {error}") from None

    def reserve(self, size):
        if os.fstat(self.plain).st_size < size:
            try:
                os.posix_fallocate(self.plain, 0, size)
            except OSError as error:
                raise Failure(f"{self.path}: {format_size(size)} are not to be had: {error}") from None

    def descs(self, start, lengths):
        places, descs = start, []
        for length in lengths:
            descs.append((places, length, self.fd))
            places += length
        return descs, "FILE"

    def put(self, start, values):
        view = memoryview(values)
        while view:
            done = os.pwrite(self.plain, view, start)
            view, start = view[done:], start + done
        os.fsync(self.plain)

    def get(self, start, size):
        values = numpy.empty(size, numpy.uint8)
        view = memoryview(values)
        while view:
            done = os.preadv(self.plain, [view], start)
            if done == 0:
                raise Failure(f"{self.path} ends at offset {start}")
            view, start = view[done:], start + done
        return values

    def close(self):
        os.close(self.fd)
        os.close(self.plain)
        if self.created:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


class FileBenchmark(Benchmark):
    """Base of the scripts that move between memory and files."""

    @classmethod
    def add_flags(cls, parser):
        parser.add_argument("--file_path", required=True, help="file to use; created if absent, never shortened")
        parser.add_argument("--baseline", action="store_true", help="plain pread and pwrite in place of the backend")
        parser.add_argument("--num_files", type=int, default=1, help="files FILE, FILE.1, ...: lanes are spread over them")

    def set_up(self):
        options = self.options
        self.stores = []
        self.set_parameters()
        if options.baseline:
            if options.initiator_mem != "DRAM":
                raise Failure("--baseline: pread and pwrite move host memory only")
            options.backend, self.agent = "pread/pwrite", None
        else:
            self.agent = make_agent("initiator", options)
        for path in self.paths():
            self.stores.append(FileStore(path, options.storage_enable_direct))
        if options.baseline:
            return
        self.registered = self.agent.register_memory([(0, 0, store.fd, store.path) for store in self.stores], "FILE")

    def set_parameters(self):
        """Turns the script's flags into options.backend_params."""

    def paths(self):
        options = self.options
        return [options.file_path + (f".{i}" if i else "") for i in range(options.num_files)]

    def make_lanes(self, size):
        options = self.options
        step = size * options.batch_size
        count = options.num_threads * options.pipeline_depth
        self.near = make_buffer(options.initiator_mem, step * count, options.gpu_id, options.enable_vmm)
        lanes = []
        for index in range(count):
            store, start = self.stores[index % len(self.stores)], index // len(self.stores) * step
            store.reserve(start + step)
            lanes.append((PlainLane if options.baseline else StorageLane)(self.agent, options, size, self.near, index * step, store, start))
        depth = options.pipeline_depth
        return [lanes[i:i + depth] for i in range(0, count, depth)]

    def drop_lanes(self, lanes):
        self.near.close()

    def tear_down(self):
        for store in getattr(self, "stores", []):
            store.close()

    def memory_text(self):
        return super().memory_text().split(" -> ")[0] + " -> File"

    def notes(self):
        if self.options.storage_enable_direct:
            return ["page cache: bypassed (O_DIRECT)"]
        return ["page cache: warm"]


def with_defaults(options, values):
    """backend_params with `values` below what --backend_params says."""
    options.backend_params = {**{key: str(value) for key, value in values.items()}, **options.backend_params}
