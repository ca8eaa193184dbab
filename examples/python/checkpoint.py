#!/usr/bin/env python3
"""Saves a sharded set of tensors through a nixl storage backend, restores it, and checks every byte.

    python examples/python/checkpoint.py --size 2GB --shards 4 --folder /mnt/ckpt
    python examples/python/checkpoint.py --backend OBJ --params '{"bucket": "b", "endpoint_override": "http://127.0.0.1:9000", ...}'

A shard is complete when its index exists. Kill the program at any time and start it again with the same arguments: complete
shards are kept, the others are written anew.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "integrations"))

import torch  # noqa: E402
from nixl_integrations import checkpoint  # noqa: E402

HIDDEN = 2048


def parse_size(text):
    units = {"KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
    number, unit = text[:-2], text[-2:].upper()
    if unit not in units or not number.replace(".", "", 1).isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write 512MB or 2GB")
    return int(float(number) * units[unit])


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed; 1 or more is needed")
    return number


def make_shard(shard, size, seed):
    """The tensors of one shard as a transformer has them: four matrices and two vectors a layer, about `size` bytes in all."""
    layer_bytes = (4 * HIDDEN * HIDDEN + 2 * HIDDEN) * 2
    generator = torch.Generator().manual_seed(seed * 1000 + shard)
    tensors = {}
    for layer in range(max(1, round(size / layer_bytes))):
        for name in ("q", "k", "v", "o"):
            raw = torch.randint(-32768, 32767, (HIDDEN, HIDDEN), dtype=torch.int16, generator=generator)
            tensors[f"shard{shard}.layer{layer}.{name}"] = raw.view(torch.bfloat16)
        for name in ("norm1", "norm2"):
            tensors[f"shard{shard}.layer{layer}.{name}"] = torch.rand(HIDDEN, generator=generator).bfloat16()
    return tensors


class Bar:
    """One line that grows on a terminal; one line at the end elsewhere."""

    def __init__(self, what):
        self.what, self.begin = what, time.perf_counter()

    def __call__(self, done, total):
        if not sys.stderr.isatty():
            return
        part = done / max(total, 1)
        rate = done / (time.perf_counter() - self.begin) / 1e9
        print(f"\r{self.what} [{'#' * int(30 * part):<30}] {100 * part:3.0f} %  {rate:.2f} GB/s", end="", file=sys.stderr, flush=True)

    def end(self):
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)


def run(what, action, *arguments, **options):
    bar = Bar(what)
    facts = action(*arguments, progress=bar, **options)
    bar.end()
    print(f"{what}: {facts['bytes'] / 1e6:.0f} MB in {facts['seconds']:.2f} s, {facts['bytes'] / facts['seconds'] / 1e9:.2f} GB/s "
          f"({facts['backend']}, {facts['path']})", flush=True)
    return facts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=parse_size("512MB"),
                        help="of all shards together; each holds whole layers of 34 MB")
    parser.add_argument("--shards", type=positive, default=4)
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "nixl_checkpoint"), help="folder, or prefix of the keys")
    parser.add_argument("--backend", default="auto", help="auto, POSIX, GDS, GDS_MT, OBJ, AZURE_BLOB")
    parser.add_argument("--params", type=json.loads, default={}, help="parameters of the backend, as JSON")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    to_objects = options.backend in ("OBJ", "AZURE_BLOB")
    if not to_objects:
        os.makedirs(options.folder, exist_ok=True)
    shared = {"backend": options.backend, "backend_params": options.params}
    paths = [f"{options.folder.strip('/') if to_objects else options.folder}/shard-{i:03d}.bin" for i in range(options.shards)]
    written = moved = 0
    for i, path in enumerate(paths):
        if checkpoint.exists(path, **shared):
            print(f"save {path}: complete already", flush=True)
            continue
        facts = run(f"save {path}", checkpoint.save, make_shard(i, options.size / options.shards, options.seed), path, **shared)
        written, moved = written + facts["seconds"], moved + facts["bytes"]
    if written:
        print(f"saved {moved / 1e9:.2f} GB at {moved / written / 1e9:.2f} GB/s (fsync included)")

    read = moved = 0
    for i, path in enumerate(paths):
        wanted = make_shard(i, options.size / options.shards, options.seed)
        back = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
        facts = run(f"load {path}", checkpoint.load, back, path, **shared)
        read, moved = read + facts["seconds"], moved + facts["bytes"]
        wrong = [name for name in wanted if not torch.equal(wanted[name].view(torch.int16), back[name].view(torch.int16))]
        if wrong:
            print(f"WRONG BYTES in {wrong[0]} and {len(wrong) - 1} more of {path}")
            return 1
    print(f"loaded {moved / 1e9:.2f} GB at {moved / read / 1e9:.2f} GB/s; every byte is right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
