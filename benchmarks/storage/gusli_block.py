#!/usr/bin/env python3
"""Memory to block devices and back through GUSLI. Writing erases what the devices hold."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from utils.benchmark_base import Benchmark, Failure, Usage, make_agent, run  # noqa: E402
from utils.memory import make_buffer  # noqa: E402
from utils.storage import FileStore, StorageLane, with_defaults  # noqa: E402


class Volume(FileStore):
    """The bytes of a device, reached by its path for filling and checking."""

    def __init__(self, number, path):
        self.number = number
        super().__init__(path, False)

    def reserve(self, size):
        if os.lseek(self.plain, 0, os.SEEK_END) < size:
            if self.created or os.path.isfile(self.path):
                super().reserve(size)
            else:
                raise Failure(f"{self.path} holds less than {size} bytes")

    def descs(self, start, lengths):
        descs, _ = super().descs(start, lengths)
        return [(place, length, self.number) for place, length, _ in descs], "BLOCK"


def mounted(path):
    with open("/proc/mounts", encoding="utf-8") as f:
        return any(line.split(" ")[0] == os.path.realpath(path) for line in f)


class GusliBlock(Benchmark):
    backend = "GUSLI"
    sizes = "4KB,64KB,1MB"
    description = __doc__

    @classmethod
    def add_flags(cls, parser):
        add = parser.add_argument
        add("--device_list", default="", help="id:type:path[,..], types F (file), K (kernel device), N (server)")
        add("--gusli_config_file", default="", metavar="TEXT", help="configuration text instead of --device_list")
        add("--gusli_device_byte_offsets", default="", help="first byte to use on each device (default 1048576)")
        add("--gusli_device_security", default="", help="one for each device (default sec=0x3)")
        add("--gusli_max_simultaneous_requests", type=int, default=32)
        add("--gusli_client_name", default="NIXLBench")
        add("--try_use_uring", action="store_true")
        add("--i_know_this_erases", action="store_true", help="use devices that are mounted")

    def set_up(self):
        options = self.options
        devices = self.devices()
        for _, kind, path in devices:
            if kind != "N" and mounted(path) and not options.i_know_this_erases:
                raise Failure(f"{path} is mounted: writing would destroy the file system (--i_know_this_erases overrides)")
        offsets = [int(x) for x in options.gusli_device_byte_offsets.split(",") if x] or [1 << 20] * len(devices)
        security = [x for x in options.gusli_device_security.split(",") if x] or ["sec=0x3"] * len(devices)
        if not len(offsets) == len(security) == len(devices):
            raise Usage("--gusli_device_byte_offsets and --gusli_device_security need one entry for each device")
        text = options.gusli_config_file or "version=1\n" + "".join(
            f"{number} {kind} W N {path} {sec}\n" for (number, kind, path), sec in zip(devices, security))
        with_defaults(options, {"config_file": text, "client_name": options.gusli_client_name,
                                "max_num_simultaneous_requests": options.gusli_max_simultaneous_requests,
                                "try_use_uring": str(options.try_use_uring).lower()})
        self.stores = []
        for (number, kind, path), offset in zip(devices, offsets):
            if kind != "N":
                self.stores.append((Volume(number, path), offset))
        self.agent = make_agent("initiator", options)
        self.registered = self.agent.register_memory([(0, 0, store.number, "") for store, _ in self.stores], "BLOCK")

    def devices(self):
        options, found = self.options, []
        if options.gusli_config_file:
            lines = [line.split() for line in options.gusli_config_file.splitlines() if line and line[0] not in "#v"]
            return [(int(words[0]), words[1], words[4]) for words in lines]
        for item in options.device_list.split(","):
            parts = item.split(":", 2)
            if len(parts) != 3 or not parts[0].isdigit() or parts[1] not in ("F", "K", "N"):
                raise Usage(f"--device_list '{item}': id:type:path is wanted, like 11:F:/tmp/volume")
            found.append((int(parts[0]), parts[1], parts[2]))
        return found

    def make_lanes(self, size):
        options = self.options
        step, count = size * options.batch_size, options.num_threads * options.pipeline_depth
        self.near = make_buffer(options.initiator_mem, step * count, options.gpu_id, options.enable_vmm)
        lanes = []
        for index in range(count):
            store, offset = self.stores[index % len(self.stores)]
            start = offset + index // len(self.stores) * step
            store.reserve(start + step)
            lanes.append(StorageLane(self.agent, options, size, self.near, index * step, store, start))
        return [lanes[i:i + options.pipeline_depth] for i in range(0, count, options.pipeline_depth)]

    def drop_lanes(self, lanes):
        self.near.close()

    def tear_down(self):
        for store, _ in getattr(self, "stores", []):
            store.close()

    def memory_text(self):
        return f"{self.options.initiator_mem} -> Block"


if __name__ == "__main__":
    sys.exit(run(GusliBlock))
