"""Initiator and target in two processes: the run behind ucx_p2p, gpunetio_p2p and `ucx_loopback --processes 2`."""

import sys
import time

from utils.benchmark_base import Benchmark, Done, make_agent, require_backend, warn_unused
from utils.lanes import RemoteFar, Server, lane_bytes, make_memory_lanes
from utils.memory import make_buffer
from utils.partner import JOIN_LIMIT_S, LOCAL_LIMIT_S, LocalTarget, connect_sockets, join_etcd, join_tcp, leave_etcd, names, role_flags, serve_target


class TwoSided(Benchmark):
    backend = "UCX"
    sizes = "4KB,64KB,1MB,16MB,256MB"
    remote = True

    @classmethod
    def add_flags(cls, parser):
        role_flags(parser)
        parser.add_argument("--processes", type=int, choices=(1, 2), default=2, help="accepted beside ucx_loopback")

    def set_up(self):
        options = self.options
        warn_unused(options, ("gds_batch_pool_size", "gds_batch_limit", "storage_enable_direct"), "no storage takes part")
        if options.target_gpu_id is None:
            options.target_gpu_id = options.gpu_id
        options.target_gpu = options.target_gpu_id
        require_backend(options)  # before a partner or a store is looked for
        self.local_target = self.etcd = None
        self.role = options.mode if options.mode in ("target", "initiator") else None
        if self.role == "target":
            self.served(serve_target(options, Server))
        if self.role is None and (options.tcp_store or options.etcd_endpoints):
            if options.tcp_store:
                self.role, self.agent, self.peer = join_tcp(options)
            else:
                self.role, self.agent, self.peer, self.etcd = join_etcd(options)
            if self.role == "target":
                server = Server(self.agent, options)
                server.serve(self.peer, time.monotonic() + options.timeout_s)
                self.served(server.asked)
        else:
            port = options.port
            if self.role is None:
                self.local_target = LocalTarget(options)
                port, options.target_ip = self.local_target.port, "127.0.0.1"
            self.agent = make_agent(names(options)[0], options)
            self.peer = connect_sockets(self.agent, options, port, LOCAL_LIMIT_S if self.local_target else JOIN_LIMIT_S)
        self.far = RemoteFar(self.agent, self.peer, options.pattern)

    def served(self, count):
        print(f"target: served {count} requests of '{names(self.options)[0]}'", file=sys.stderr)
        raise Done

    def make_lanes(self, size):
        return self.make_lanes_at(size, lane_bytes(self.options, size), 0, 0)

    def make_lanes_at(self, size, total, near_offset, far_offset):
        """Lanes of one size in buffers of `total` bytes, from these offsets on."""
        options = self.options
        far_desc = self.far.allocate(total, options)
        self.near = make_buffer(options.initiator_mem, total, options.gpu_id, options.enable_vmm)
        return make_memory_lanes(self.agent, self.peer, options, size, self.near, self.far, far_desc, (near_offset, far_offset))

    def drop_lanes(self, lanes):
        self.near.close()

    def tear_down(self):
        failing = sys.exc_info()[0] is not None
        try:
            if hasattr(self, "far") and not failing:
                self.far.ask(do="bye")
        finally:
            if getattr(self, "local_target", None):
                if failing:
                    self.local_target.process.kill()
                self.local_target.stop()
            if getattr(self, "etcd", None):
                leave_etcd(self.etcd, self.role)
