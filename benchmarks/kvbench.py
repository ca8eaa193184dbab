#!/usr/bin/env python3
"""What the KV caches of models ask of a transfer library, in the commands of kvbench.

  kvcache                what a request of a model is made of: descriptors and their size
  plan                   the nixlbench command lines for it
  profile                runs them
  ct-perftest FILE       one traffic matrix between rank processes of this host (iters, traffic_pattern)
  sequential-ct-perftest FILE   several, one after the other and each alone (traffic_patterns)

Flags that a command does not know are handed on to nixlbench. What cannot run here exits 77 with its reason."""

import argparse
import csv
import json
import os
import pathlib
import shlex
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")

from utils import traffic  # noqa: E402
from utils.benchmark_base import SKIPPED, Failure, Skip  # noqa: E402
from utils.config import Parser, common_flags, integer, parse_options  # noqa: E402
from utils.kv_models import MODELS, Workload, load_model  # noqa: E402

NIXLBENCH = pathlib.Path(__file__).resolve().parent / "nixlbench.py"
PLACES = {"memory": "DRAM", "gpu": "VRAM"}


def model_flags(parser):
    add = parser.add_argument
    add("--model", choices=sorted(MODELS), help="default: all")
    add("--model_config", "--model_configs", default="", metavar="FILE[,FILE]", help="models from YAML, JSON or TOML files")
    add("--pp", type=integer(1), default=1)
    add("--tp", type=integer(1), default=1)
    add("--isl", type=integer(1), default=10_000, help="tokens of a prompt")
    add("--num_requests", type=integer(1), default=1)
    add("--page_size", type=integer(1), default=256, help="tokens of a page")
    add("--access_pattern", choices=("block", "layer"), default="block", help="a descriptor is a page of all layers, or of one")
    add("--source", choices=(*PLACES, "file"), default="memory")
    add("--destination", choices=(*PLACES, "file"), default="memory")
    add("--backend", default="", help="default: UCX, and with files POSIX, or GDS for GPU memory")
    add("--format", choices=("text", "json", "csv"), default="text")


def workloads(options):
    files = [path for path in options.model_config.split(",") if path]
    models = [load_model(path) for path in files] or ([MODELS[options.model]] if options.model else list(MODELS.values()))
    return [Workload(model, options.isl, options.num_requests, options.page_size, options.tp, options.pp, options.access_pattern)
            for model in models]


def command(workload, options, rest):
    """The nixlbench line of a workload."""
    ends = options.source, options.destination
    words = ["--start_block_size", workload.io_size, "--max_block_size", workload.io_size, "--start_batch_size",
             workload.batch_size, "--max_batch_size", workload.batch_size]
    if "file" in ends:
        memory = PLACES.get(ends[0]) or PLACES.get(ends[1])
        if memory is None:
            raise Failure("--source file --destination file: one of the two is memory or gpu")
        words += ["--backend", options.backend or ("GDS" if memory == "VRAM" else "POSIX"), "--initiator_seg_type", memory,
                  "--op_type", "READ" if ends[0] == "file" else "WRITE"]
    else:
        words += ["--backend", options.backend or "UCX", "--initiator_seg_type", PLACES[ends[0]], "--target_seg_type", PLACES[ends[1]],
                  "--op_type", "WRITE"]
    return [sys.executable, str(NIXLBENCH), *map(str, words), *rest]


def show(rows, form):
    if form == "json":
        print(json.dumps(rows, indent=1))
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        traffic.publish(rows, None)


def kvcache(options, _):
    show([workload.row() for workload in workloads(options)], options.format)
    return 0


def plan(options, rest):
    lines = [(workload, shlex.join(command(workload, options, rest))) for workload in workloads(options)]
    if options.format == "text":
        for workload, line in lines:
            print(f"# {workload.model.name}: {workload.batch_size} x {workload.io_size} bytes\n{line}")
    else:
        show([workload.row() | {"Command": line} for workload, line in lines], options.format)
    return 0


def profile(options, rest):
    codes = []
    for workload in workloads(options):
        print(f"# {workload.model.name}: {workload.batch_size} x {workload.io_size} bytes", flush=True)
        codes.append(subprocess.run(command(workload, options, rest), check=False).returncode)
    return next((code for code in codes if code not in (0, SKIPPED)), SKIPPED if SKIPPED in codes else 0)


def perftest(name, words):
    parser = Parser(prog=f"kvbench.py {name}", description=__doc__)
    common_flags(parser, backend="UCX", sizes="4KB")
    parser.add_argument("file", help="YAML, JSON or TOML")
    parser.add_argument("--verify_buffers", action="store_true", help="check the bytes once more after the timed part")
    parser.add_argument("--print_recv_buffers", action="store_true")
    parser.add_argument("--json_output_path", default="")
    options = parse_options(parser, words)
    rows = (traffic.one if name == "ct-perftest" else traffic.sequential)(options.file, options)
    traffic.publish(rows, options.json_output_path)
    return 0


def main(words):
    commands = {"kvcache": kvcache, "plan": plan, "profile": profile}
    perftests = ("ct-perftest", "sequential-ct-perftest")
    try:
        if words and words[0] in perftests:
            return perftest(words[0], words[1:])
        parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        parser.add_argument("command", choices=(*commands, *perftests))
        model_flags(parser)
        options, rest = parser.parse_known_args(words)
        if rest and options.command == "kvcache":
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return commands[options.command](options, rest)
    except Skip as reason:
        print(f"SKIP: kvbench: {reason}")
        return SKIPPED
    except (Failure, OSError) as reason:
        print(f"FAIL: {reason}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
