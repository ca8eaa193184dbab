#!/usr/bin/env python3
"""Memory to objects of an S3 server and back: PUT, then GET, of --num_objects objects; they are removed at the end."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from utils import s3_requests  # noqa: E402
from utils.benchmark_base import Benchmark, Usage, make_agent, run  # noqa: E402
from utils.config import integer  # noqa: E402
from utils.memory import HostBuffer, make_buffer  # noqa: E402
from utils.storage import StorageLane, with_defaults  # noqa: E402

FLAGS = {"bucket_name": "bucket", "region": "region", "endpoint_override": "endpoint_override", "scheme": "scheme",
         "access_key": "access_key", "secret_key": "secret_key", "session_token": "session_token", "ca_bundle": "ca_bundle",
         "crt_min_limit": "crtMinLimit", "req_checksum": "req_checksum"}


class ObjectStore:
    """Object number `start`; written and read outside the timed loop through the agent as well."""

    def __init__(self, agent, names):
        self.agent, self.names = agent, names
        self.registered = agent.register_memory([(0, 0, i, name) for i, name in enumerate(names)], "OBJ")

    def descs(self, start, lengths):
        return [(0, length, (start + i) % len(self.names)) for i, length in enumerate(lengths)], "OBJ"

    def _move(self, operation, start, buffer):
        regs = self.agent.register_memory([(buffer.address, buffer.size, 0, "")], "DRAM")
        handle = self.agent.initialize_xfer(operation, self.agent.get_xfer_descs([(buffer.address, buffer.size, 0)], "DRAM"),
                                            self.agent.get_xfer_descs([(0, buffer.size, start)], "OBJ"), self.agent.name)
        if self.agent.transfer(handle) != "DONE":
            handle.wait()
        self.agent.release_xfer_handle(handle)
        self.agent.deregister_memory(regs)

    def put(self, start, values):
        buffer = HostBuffer(len(values))
        buffer.write(values)
        self._move("WRITE", start, buffer)

    def get(self, start, size):
        buffer = HostBuffer(size)
        self._move("READ", start, buffer)
        return buffer.read().copy()


class ObjectLane(StorageLane):
    """Goes through its objects in turn; a request for each is made beforehand."""

    def __init__(self, *arguments, objects):
        super().__init__(*arguments)
        self.objects, self.handles, self.next = objects, [], 0

    def open(self):
        for self.start in self.objects:
            super().open()
            self.handles.append(self.handle)
        self.next, self.start, self.handle = 0, self.objects[0], self.handles[0]

    def post(self):
        place, self.next = self.next, (self.next + 1) % len(self.handles)
        self.handle, self.start = self.handles[place], self.objects[place]
        return super().post()

    def fill(self, salt):
        self.start = self.objects[self.next]
        super().fill(salt)

    def close(self):
        for self.handle in self.handles:
            super().close()
        self.handles = []


class ObjectS3(Benchmark):
    backend = "OBJ"
    sizes = "1MB,16MB,256MB"
    description = __doc__

    @classmethod
    def add_flags(cls, parser):
        for flag in FLAGS:
            parser.add_argument(f"--{flag}", f"--obj_{flag}", default="", help=f"parameter {FLAGS[flag]} of OBJ")
        parser.add_argument("--use_virtual_addressing", "--obj_use_virtual_addressing", action="store_true")
        parser.add_argument("--num_objects", type=integer(1), default=100)

    def set_up(self):
        options = self.options
        values = {name: getattr(options, flag) for flag, name in FLAGS.items() if getattr(options, flag)}
        if options.use_virtual_addressing:
            values["use_virtual_addressing"] = "true"
        with_defaults(options, values)
        if not options.backend_params.get("bucket") and not os.environ.get("AWS_DEFAULT_BUCKET"):
            raise Usage("--bucket_name is needed, or the environment variable AWS_DEFAULT_BUCKET")
        given = " ".join(options.argv).replace("-", "_")
        if "iterations" not in given and "num_iter" not in given:  # each object once
            options.iterations, options.large_blk_iter_ftr = options.num_objects, 1
            options.warmup_iter = min(options.warmup_iter, 2)
        self.agent = make_agent("initiator", options)
        self.names = [f"nixlbench-{options.benchmark_group}-{i}" for i in range(options.num_objects)]
        self.store = ObjectStore(self.agent, self.names)

    def operations(self):
        return ["WRITE", "READ"]

    def make_lanes(self, size):
        options = self.options
        count = min(options.num_threads * options.pipeline_depth, options.num_objects)
        options.num_threads = min(options.num_threads, count)
        options.batch_size = 1
        self.near = make_buffer(options.initiator_mem, size * count, options.gpu_id, options.enable_vmm)
        lanes = [ObjectLane(self.agent, options, size, self.near, i * size, self.store, i, objects=list(range(i, options.num_objects, count)))
                 for i in range(count)]
        if options.operation == "READ":
            for i in range(options.num_objects):
                self.store.put(i, self.near.read(0, size))
        depth = max(1, count // options.num_threads)
        return [lanes[i:i + depth] for i in range(0, count, depth)]

    def drop_lanes(self, lanes):
        self.near.close()

    def tear_down(self):
        if hasattr(self, "store"):
            s3_requests.delete(self.options.backend_params, self.names)

    def memory_text(self):
        return f"{self.options.initiator_mem} -> Object"


if __name__ == "__main__":
    sys.exit(run(ObjectS3))
