#!/usr/bin/env python3
"""GPU memory to a file and back through GDS."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from utils.benchmark_base import run  # noqa: E402
from utils.storage import FileBenchmark, with_defaults  # noqa: E402


class GdsStorage(FileBenchmark):
    backend = "GDS"
    sizes = "1GB"
    description = __doc__

    def set_parameters(self):
        options = self.options
        if options.memory_type is None and "--initiator_mem" not in " ".join(options.argv):
            options.initiator_mem = "VRAM"
        if options.backend == "GDS":
            with_defaults(options, {"batch_pool_size": options.gds_batch_pool_size, "batch_limit": options.gds_batch_limit})

    def operations(self):
        return ["WRITE", "READ"]


if __name__ == "__main__":
    sys.exit(run(GdsStorage))
