#!/usr/bin/env python3
"""The flags, sweep and columns of nixlbench on the engine of these scripts: blocks double from --start_block_size to
--max_block_size, for each the batch from --start_batch_size to --max_batch_size.

Memory backends run between two processes: the same line twice with --etcd_endpoints (or --runtime_type ASIO and its address), or
one line, which starts its partner. Storage backends run in one process. What cannot run here exits 77 with its reason."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import numpy  # noqa: E402

from multi_node.gpunetio_p2p import GpunetioP2p  # noqa: E402
from multi_node.hierarchical import Hierarchical  # noqa: E402
from multi_node.ucx_p2p import UcxP2p  # noqa: E402
from single_node.gds_storage import GdsStorage  # noqa: E402
from single_node.posix_storage import PosixStorage  # noqa: E402
from storage.gusli_block import GusliBlock  # noqa: E402
from storage.obj_s3 import ObjectS3  # noqa: E402
from utils.benchmark_base import Skip, Usage, plugin_report, run, warn_unused  # noqa: E402
from utils.config import Parser, integer, parse_size  # noqa: E402
from utils.storage import FileBenchmark  # noqa: E402
from utils.two_sided import TwoSided  # noqa: E402

LINK_GB_S = 50  # what "Network Util" is a share of
FILE_BACKENDS = {"POSIX": PosixStorage, "GDS": GdsStorage, "GDS_MT": GdsStorage, "HF3FS": FileBenchmark}
OTHER_BACKENDS = {"OBJ": ObjectS3, "GUSLI": GusliBlock, "GPUNETIO": GpunetioP2p}


class Sweep:
    """What nixlbench adds to a script: its flags, rows of blocks and batches, and its table."""

    @classmethod
    def add_flags(cls, parser):
        super().add_flags(parser)
        known = {name for action in parser._actions for name in action.option_strings}

        def add(name, **options):
            if f"--{name}" not in known:
                parser.add_argument(f"--{name}", **options)

        add("total_buffer_size", type=parse_size, default=8 << 30, help="bound of a row's bytes in flight")
        add("start_block_size", type=parse_size, default=4096)
        add("max_block_size", type=parse_size, default=64 << 20)
        add("start_batch_size", type=integer(1), default=1)
        add("max_batch_size", type=integer(1), default=1)
        add("runtime_type", type=str.upper, choices=("ETCD", "ASIO"), default="ETCD", help="how two processes find each other")
        add("asio_address", default="127.0.0.1")
        add("asio_port", type=int, default=12345)
        add("worker_type", choices=("nixl", "nvshmem"), default="nixl")
        add("mode", type=str.upper, choices=("SG", "MG"), default="SG")
        add("scheme", choices=("pairwise", "manytoone", "onetomany", "tp"), default="pairwise")
        add("num_initiator_dev", type=integer(1), default=1)
        add("num_target_dev", type=integer(1), default=1)
        add("device_list", default="all", help="devices of the backend (UCX: network devices; GUSLI: id:type:path)")
        add("use_hugepages", action="store_true")
        add("randomize_location_mode", choices=("none", "blockaligned", "bytealigned"), default="none")
        add("randomize_location_mode_seed", type=int, default=0)
        add("filepath", default="", help="folder, or the file itself")
        add("filenames", default="", help="comma list of files below --filepath")
        for name in ("hf3fs_iopool_size", "azure_blob_account_url", "azure_blob_container_name", "azure_blob_connection_string",
                     "gpunetio_device_list"):
            add(name, default="")
        for action in parser._actions:
            if action.dest == "file_path":
                action.required = False
        parser.set_defaults(buffer_sizes=[4096], group_size=1)

    def steps(self):
        options, rows = self.options, []
        block = options.start_block_size
        while block <= options.max_block_size:
            batch = options.start_batch_size
            while batch <= options.max_batch_size:
                if block * batch * options.num_threads * options.pipeline_depth > options.total_buffer_size:
                    print(f"note: {block} bytes x {batch} left out: above --total_buffer_size", file=sys.stderr)
                else:
                    rows.append((block, batch))
                batch *= 2
            block *= 2
        if not rows:
            raise Usage(f"no row between --start_block_size {options.start_block_size} and --max_block_size "
                        f"{options.max_block_size} fits --total_buffer_size {options.total_buffer_size}")
        return rows

    def set_up(self):
        options = self.options
        if options.worker_type != "nixl":
            raise Skip(f"--worker_type {options.worker_type} is no part of this suite")
        warn_unused(options, ("use_hugepages",), "the same-host path gathers huge pages by itself")
        if options.runtime_type == "ASIO" and hasattr(options, "tcp_store"):
            options.tcp_store = options.tcp_store or f"{options.asio_address}:{options.asio_port}"
        if options.mode in ("SG", "MG"):
            options.mode = None  # no role
        if options.backend in ("UCX", "UCX_MO") and options.device_list not in ("", "all"):
            options.backend_params.setdefault("device_list", options.device_list)
        options.buffer_sizes = sorted({block for block, _ in self.steps()})
        super().set_up()

    def text(self, report):
        options = self.options
        pairs = options.num_initiator_dev if options.scheme == "pairwise" else 1
        heads = ["Block Size (B)", "Batch Size", "B/W (GB/Sec)"] + (["Aggregate B/W (GB/Sec)", "Network Util (%)"] if pairs > 1 else [])
        heads += ["Avg Lat. (us)", "Avg Prep (us)", "P99 Prep (us)", "Avg Post (us)", "P99 Post (us)", "Avg Tx (us)", "P99 Tx (us)"]
        lines = ["  ".join(heads)]
        for row in report["rows"]:
            per_thread = row["iterations"] / options.num_threads
            latency = row["wall_s"] * 1e6 / (per_thread * row["batch_size"])
            cells = [row["buffer_size_bytes"], row["batch_size"], row["bandwidth_gbps_decimal"]]
            if pairs > 1:
                total = row["bandwidth_gbps_decimal"] * pairs
                cells += [total, 100 * total / (LINK_GB_S * pairs)]
            tails = row["tails_us"]
            cells += [latency, row["prep_us_mean"], tails.get("prep"), row["post_us_mean"], tails.get("post"), row["tx_us_mean"],
                      tails.get("tx")]
            lines.append("  ".join(_cell(cell).ljust(len(head)) for cell, head in zip(cells, heads)).rstrip())
        wrong = [row for row in report["rows"] if row["consistency"] != "PASS"]
        lines += [f"Consistency: {row['buffer_size_bytes']} x {row['batch_size']}: {row['consistency']}" for row in wrong]
        return "\n".join([f"{report['operation']} {report['backend']} {report['memory_text']}", *lines,
                          f"Transport: {report['path'] or 'unknown'}"])


def _cell(value):
    return "0" if value is None else str(value) if isinstance(value, int) else f"{value:.6f}" if value < 1 else f"{value:.3f}"


class TwoSidedSweep(Sweep, UcxP2p):
    description = __doc__

    def make_lanes(self, size):
        """Somewhere in a larger buffer when --randomize_location_mode says so: the far and the near place are drawn apart."""
        options = self.options
        if options.randomize_location_mode == "none":
            return super().make_lanes(size)
        total = size * options.batch_size * options.num_threads * options.pipeline_depth
        room = min(total, options.total_buffer_size - total)
        unit = size if options.randomize_location_mode == "blockaligned" else 1
        draw = numpy.random.default_rng([options.randomize_location_mode_seed, size, options.batch_size])
        near, far = (int(draw.integers(0, room // unit + 1)) * unit for _ in range(2))
        return self.make_lanes_at(size, total + room, near, far)


def with_sweep(base):
    return type(f"{base.__name__}Sweep", (Sweep, base), {"description": __doc__})


class FileSweep:
    """--filepath and --filenames in place of --file_path."""

    def paths(self):
        options = self.options
        folder = options.filepath or options.file_path
        if not folder:
            raise Usage(f"{options.backend} needs --filepath (a folder, or a file)")
        if options.filenames:
            return [os.path.join(folder, name) for name in options.filenames.split(",") if name]
        options.file_path = os.path.join(folder, "nixlbench_file") if os.path.isdir(folder) else folder
        return super().paths()


class NoScript(Sweep, TwoSided):
    """A backend that this suite moves nothing through."""

    description = __doc__

    def set_up(self):
        report = plugin_report().get(self.options.backend, {"available": False, "reason": "no such backend"})
        raise Skip("this suite has no script for it" if report["available"] else report["reason"])


def benchmark_for(words):
    """The class behind a command line: it depends on the backend, and for memory on scheme and devices."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--backend", default="UCX")
    first.add_argument("--scheme", default="pairwise")
    first.add_argument("--num_initiator_dev", default="1")
    first.add_argument("--num_target_dev", default="1")
    known = first.parse_known_args(words)[0]
    if known.backend in FILE_BACKENDS:
        base = FILE_BACKENDS[known.backend]
        return type(f"{base.__name__}Sweep", (Sweep, FileSweep, base), {"description": __doc__, "backend": known.backend})
    if known.backend in OTHER_BACKENDS:
        return with_sweep(OTHER_BACKENDS[known.backend])
    if known.backend in ("AZURE_BLOB", "3FS"):
        return type("NoScript", (NoScript,), {"backend": known.backend})
    if known.scheme != "pairwise" or known.num_initiator_dev != "1" or known.num_target_dev != "1":
        return with_sweep(Hierarchical)
    return TwoSidedSweep


def main():
    return run(benchmark_for(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
