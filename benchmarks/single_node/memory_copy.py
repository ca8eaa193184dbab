#!/usr/bin/env python3
"""Baseline without NIXL: memcpy, and on a machine with a GPU the copies host to device, device to host, device to device."""

import ctypes
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from utils.benchmark_base import Benchmark, Lane, run, warn_unused  # noqa: E402
from utils.memory import INITIATOR_FILL, Cuda, first_difference, make_buffer, pattern  # noqa: E402


class CopyLane(Lane):
    def __init__(self, options, size):
        self.options, self.size = options, size
        length = size * options.batch_size
        self.source = make_buffer(options.initiator_mem, length, options.gpu_id, options.enable_vmm)
        self.destination = make_buffer(options.target_mem, length, options.gpu_id, options.enable_vmm)
        if options.operation == "READ":
            self.source, self.destination = self.destination, self.source
        self._copy = self._cuda_copy if "VRAM" in (self.source.kind, self.destination.kind) else self._host_copy

    def _host_copy(self, offset):
        ctypes.memmove(self.destination.address + offset, self.source.address + offset, self.size)

    def _cuda_copy(self, offset):
        cuda = Cuda.get()
        cuda.check(cuda.lib.cuMemcpy(ctypes.c_uint64(self.destination.address + offset),
                                     ctypes.c_uint64(self.source.address + offset), ctypes.c_size_t(self.size)), "cuMemcpy")

    def post(self):
        for offset in range(0, self.size * self.options.batch_size, self.size):
            self._copy(offset)
        if self._copy == self._cuda_copy:
            cuda = Cuda.get()
            cuda.check(cuda.lib.cuStreamSynchronize(None), "cuStreamSynchronize")
        return True

    def fill(self, salt):
        self.source.write(pattern(self.source.size, self.options.pattern, INITIATOR_FILL, salt))
        self.destination.write(pattern(self.destination.size, self.options.pattern, 0, salt + 1))

    def check(self, salt):
        wanted = pattern(self.source.size, self.options.pattern, INITIATOR_FILL, salt)
        return first_difference(self.destination.read(), wanted)

    def path(self):
        return "cuMemcpy" if self._copy == self._cuda_copy else "memcpy"


class MemoryCopy(Benchmark):
    backend = "memcpy"
    sizes = "4KB,64KB,1MB,16MB,64MB,256MB"
    description = __doc__

    def set_up(self):
        warn_unused(self.options, ("enable_pt", "progress_threads", "gds_batch_pool_size", "gds_batch_limit",
                                   "storage_enable_direct", "backend_params"), "no agent takes part")

    def make_lanes(self, size):
        depth = range(self.options.pipeline_depth)
        return [[CopyLane(self.options, size) for _ in depth] for _ in range(self.options.num_threads)]

    def drop_lanes(self, lanes):
        for lane in (lane for thread in lanes for lane in thread):
            lane.source.close()
            lane.destination.close()


if __name__ == "__main__":
    sys.exit(run(MemoryCopy))
