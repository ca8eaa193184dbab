#!/usr/bin/env python3
"""Memory to files and back through POSIX: io_uring, libaio, POSIX AIO, or what the backend takes by itself."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from utils.benchmark_base import run, warn_unused  # noqa: E402
from utils.storage import FileBenchmark, with_defaults  # noqa: E402

ENGINES = {"AIO": "use_aio", "URING": "use_uring", "POSIXAIO": "use_posix_aio"}


class PosixStorage(FileBenchmark):
    backend = "POSIX"
    sizes = "4KB,64KB,1MB"
    description = __doc__

    @classmethod
    def add_flags(cls, parser):
        super().add_flags(parser)
        parser.add_argument("--api_type", "--posix_api_type", type=str.upper, choices=ENGINES, help="default: automatic")
        parser.add_argument("--posix_ios_pool_size", type=int, default=65536)
        parser.add_argument("--posix_kernel_queue_size", type=int, default=256)

    def set_parameters(self):
        options = self.options
        warn_unused(options, ("gds_batch_pool_size", "gds_batch_limit", "progress_threads"), "POSIX has no such parameter")
        values = {"ios_pool_size": options.posix_ios_pool_size, "kernel_queue_size": options.posix_kernel_queue_size}
        if options.api_type:
            values[ENGINES[options.api_type]] = "true"
        if options.backend == "POSIX":
            with_defaults(options, values)


if __name__ == "__main__":
    sys.exit(run(PosixStorage))
