#!/usr/bin/env python3
"""GDS or GDS_MT: one buffer cut into --batch_size descriptors, to a file or from it."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from utils.benchmark_base import Usage, run  # noqa: E402
from utils.storage import FileBenchmark, with_defaults  # noqa: E402


class GdsBenchmark(FileBenchmark):
    backend = "GDS"
    sizes = "1GB"
    description = __doc__

    @classmethod
    def add_flags(cls, parser):
        super().add_flags(parser)
        parser.add_argument("--gds_mt", action="store_true", help="backend GDS_MT")
        parser.add_argument("--gds_mt_num_threads", type=int, default=1)
        parser.set_defaults(batch_size=128)

    def set_parameters(self):
        options = self.options
        if options.memory_type is None and "--initiator_mem" not in " ".join(options.argv):
            options.initiator_mem = "VRAM"
        if options.gds_mt:
            options.backend = "GDS_MT"
            with_defaults(options, {"thread_count": options.gds_mt_num_threads})
        elif options.backend == "GDS":
            with_defaults(options, {"batch_pool_size": options.gds_batch_pool_size, "batch_limit": options.gds_batch_limit})

    def make_lanes(self, size):
        """`size` is the whole buffer; a descriptor is a part of it."""
        if size % self.options.batch_size:
            raise Usage(f"--buffer_size {size} is no multiple of --batch_size {self.options.batch_size}")
        return super().make_lanes(size // self.options.batch_size)


if __name__ == "__main__":
    sys.exit(run(GdsBenchmark))
