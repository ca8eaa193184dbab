#!/usr/bin/env python3
"""Two agents of one host move memory through UCX: in one process, or with --processes 2 in two."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from utils.benchmark_base import Benchmark, make_agent, run, warn_unused  # noqa: E402
from utils.lanes import NearFar, lane_bytes, make_memory_lanes  # noqa: E402
from utils.memory import make_buffer  # noqa: E402
from utils.two_sided import TwoSided  # noqa: E402


class Loopback(Benchmark):
    backend = "UCX"
    sizes = "4KB,64KB,1MB,64MB"
    description = __doc__

    @classmethod
    def add_flags(cls, parser):
        parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="processes for the two agents")

    def set_up(self):
        options = self.options
        warn_unused(options, ("gds_batch_pool_size", "gds_batch_limit", "storage_enable_direct"), "no storage takes part")
        self.source = make_agent("initiator", options)
        self.target = make_agent("target", options)
        self.source.add_remote_agent(self.target.get_agent_metadata())

    def make_lanes(self, size):
        options, total = self.options, lane_bytes(self.options, size)
        self.near = make_buffer(options.initiator_mem, total, options.gpu_id, options.enable_vmm)
        self.far = make_buffer(options.target_mem, total, options.gpu_id, options.enable_vmm)
        self.registered = self.target.register_memory([(self.far.address, total, self.far.device, "")], self.far.kind)
        self.source.add_remote_agent(self.target.get_agent_metadata())
        far_desc = (self.far.address, total, self.far.device)
        return make_memory_lanes(self.source, "target", options, size, self.near, NearFar(self.far, options.pattern), far_desc)

    def drop_lanes(self, lanes):
        self.target.deregister_memory(self.registered)
        self.near.close()
        self.far.close()


class TwoProcesses(TwoSided):
    sizes = Loopback.sizes
    description = __doc__


def main():
    words = [word.replace("=", " ") for word in sys.argv[1:]]
    two = "--processes 2" in " ".join(words)
    return run(TwoProcesses if two else Loopback)


if __name__ == "__main__":
    sys.exit(main())
