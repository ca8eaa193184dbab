"""Flags of the benchmark scripts: sizes, spellings, defaults, and the TOML file that may hold the same names."""

import argparse
import json
import os
import pathlib
import re
import sys

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
MEMORY_TYPES = ("DRAM", "VRAM")


def parse_size(text):
    """Bytes of "4KB", "64K", "1MiB", "4096"; K, M and G are powers of 1024. ValueError names the text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(text), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise ValueError(f"'{text}' is no size; write 4096, 4KB, 64KiB, 1MB or 1GB")
    return size


def parse_sizes(text):
    return [parse_size(part) for part in str(text).split(",") if part.strip()]


def format_size(size):
    """"4 KB" style; sizes that are no whole number of a unit stay in bytes."""
    for unit, factor in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if size >= factor and size % factor == 0:
            return f"{size // factor} {unit}"
    return f"{size} B"


def _checked(convert, what):
    def parse(text):
        try:
            return convert(text)
        except (ValueError, TypeError) as error:
            raise argparse.ArgumentTypeError(str(error) or f"'{text}' is no {what}") from None

    return parse


def integer(low, high=None):
    def convert(text):
        value = int(str(text))
        if high is not None and value > high:
            raise ValueError(f"{value} is above the greatest allowed value, {high}")
        if value < low:
            raise ValueError(f"{value} is below the least allowed value, {low}")
        return value

    return _checked(convert, "whole number")


def json_object(text):
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("a JSON object is wanted, like '{\"num_threads\": \"2\"}'")
    return {str(key): str(item) for key, item in value.items()}


def memory_type(text):
    value = str(text).upper()
    if value not in MEMORY_TYPES:
        raise ValueError(f"'{text}' is no memory type; allowed: {', '.join(MEMORY_TYPES)}")
    return value


def operation(text):
    value = str(text).upper()
    if value not in ("READ", "WRITE"):
        raise ValueError(f"'{text}' is no operation; allowed: READ, WRITE")
    return value


class Parser(argparse.ArgumentParser):
    """Takes every flag with dashes or underscores, and exits with 2 on a usage error."""

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_underscored(word) for word in words], namespace)


def _underscored(word):
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def common_flags(parser, *, backend, sizes, iterations=1000, warmup=100):
    """Adds the flags that all scripts share. `sizes`: default of --buffer_sizes, as text."""
    add = parser.add_argument
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--buffer_sizes", type=_checked(parse_sizes, "size list"), metavar="A,B,..",
                       help=f"sizes of one descriptor, like 4KB,1MB (default {sizes})")
    group.add_argument("--buffer_size", type=_checked(parse_size, "size"), metavar="SIZE", help="one size")
    add("--iterations", "--num_iter", type=integer(1), default=iterations, help="timed transfers a size")
    add("--warmup_iter", type=integer(0), default=warmup, help="untimed transfers a size")
    add("--large_blk_iter_ftr", type=integer(1), default=16, help="divisor of both counts above 1 MiB")
    add("--operation", "--op_type", type=_checked(operation, "operation"), default="WRITE", metavar="READ|WRITE")
    add("--batch_size", type=integer(1), default=1, help="descriptors a transfer")
    add("--memory_type", type=_checked(memory_type, "memory type"), default=None, metavar="DRAM|VRAM", help="both sides")
    add("--initiator_mem", "--initiator_seg_type", type=_checked(memory_type, "memory type"), metavar="DRAM|VRAM")
    add("--target_mem", "--target_seg_type", type=_checked(memory_type, "memory type"), metavar="DRAM|VRAM")
    add("--gpu_id", type=integer(0), default=0, help="CUDA ordinal for VRAM")
    add("--verify_data", "--check_consistency", action="store_true", help="check every iteration, not only the first")
    add("--enable_pt", action="store_true", help="progress thread on")
    add("--progress_threads", type=integer(0), default=0, help="the backend's num_threads; above 0 implies --enable_pt")
    add("--enable_vmm", action="store_true", help="VRAM buffers from the CUDA virtual-memory interface")
    add("--storage_enable_direct", "--direct_io", action="store_true", help="O_DIRECT on storage files")
    add("--gds_batch_pool_size", type=integer(1), default=32)
    add("--gds_batch_limit", type=integer(1), default=128)
    add("--etcd_endpoints", default=os.environ.get("NIXL_ETCD_ENDPOINTS", ""), metavar="URL")
    add("--benchmark_group", default="default", metavar="NAME", help="rendezvous name")
    add("--backend", default=backend)
    add("--backend_params", type=_checked(json_object, "JSON object"), default={}, metavar="JSON")
    add("--num_threads", type=integer(1), default=1, help="initiator threads, each with its own buffers")
    add("--pipeline_depth", type=integer(1), default=1, help="transfers in flight a thread")
    add("--recreate_xfer", action="store_true", help="a new request each iteration")
    add("--reregister_mem", action="store_true", help="register the memory anew each iteration")
    add("--prepared_xfer", action="store_true", help="requests from prepared descriptor lists")
    add("--details", action="store_true", help="prepare, post and transfer times apart")
    add("--format", choices=("text", "json", "csv"), default="text")
    add("--output", metavar="FILE", help="where the report goes; the text still goes to standard output")
    add("--plot", metavar="FILE", help="bandwidth and latency over the size, as a picture")
    add("--config_file", metavar="FILE", help="TOML with the same names; the command line wins")
    add("--pattern", type=integer(0), default=0, help="number of the data pattern: same number, same bytes")
    add("--timeout_s", type=integer(1), default=300, help="the whole run is ended after this long")
    parser.set_defaults(default_sizes=sizes)


def parse_options(parser, argv=None):
    """Command line over config file over defaults; then the rules between flags. Usage errors exit with 2."""
    outer = Parser(add_help=False, allow_abbrev=False)
    outer.add_argument("--config_file")
    path = outer.parse_known_args(argv)[0].config_file
    if path:
        _apply_file(parser, path)
    options = parser.parse_args(argv)
    if options.buffer_size:
        options.buffer_sizes = [options.buffer_size]
    elif not options.buffer_sizes:
        options.buffer_sizes = parse_sizes(options.default_sizes)
    both = options.memory_type or "DRAM"
    options.initiator_mem = options.initiator_mem or both
    options.target_mem = options.target_mem or both
    options.enable_pt = options.enable_pt or options.progress_threads > 0
    options.argv = list(sys.argv[1:] if argv is None else argv)
    return options


def _apply_file(parser, path):
    try:
        import tomllib
    except ImportError:
        parser.error("--config_file needs Python 3.11 or newer")
    try:
        values = tomllib.loads(pathlib.Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        parser.error(f"--config_file {path}: {error}")
    actions = {name.lstrip("-"): action for action in parser._actions for name in action.option_strings}
    for name, value in values.items():
        action = actions.get(name.replace("-", "_"))
        if action is None or action.dest in ("help", "config_file"):
            parser.error(f"--config_file {path}: no flag is called '{name}'")
        if isinstance(value, list):
            value = ",".join(map(str, value))
        elif isinstance(value, dict):
            value = json.dumps(value)
        if isinstance(value, bool) or action.nargs == 0:
            if not isinstance(value, bool):
                parser.error(f"--config_file {path}: '{name}' is true or false")
        else:
            try:
                value = parser._get_value(action, str(value))
            except argparse.ArgumentError as error:
                parser.error(f"--config_file {path}: {error}")
        action.required = False
        parser.set_defaults(**{action.dest: value})


def iterations_for(options, size):
    """(timed, warm-up) counts of a size: large blocks take fewer."""
    if size <= 1 << 20:
        return options.iterations, options.warmup_iter
    divisor = options.large_blk_iter_ftr
    timed = min(options.iterations, max(10, options.iterations // divisor))
    return timed, min(options.warmup_iter, max(2, options.warmup_iter // divisor))
