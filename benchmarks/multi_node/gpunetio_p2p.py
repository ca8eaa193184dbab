#!/usr/bin/env python3
"""Initiator and target over GPUNETIO: GPU memory, posted by the GPU. Needs a ConnectX NIC, DOCA and GPUDirect RDMA."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from utils.benchmark_base import run  # noqa: E402
from utils.two_sided import TwoSided  # noqa: E402


class GpunetioP2p(TwoSided):
    backend = "GPUNETIO"
    sizes = "1MB,16MB,256MB"
    description = __doc__

    @classmethod
    def add_flags(cls, parser):
        super().add_flags(parser)
        parser.add_argument("--gpu_devices", default="0", help="ordinals: the initiator's, then the target's on one host")
        parser.add_argument("--gpunetio_oob_list", default="", help="network interface of the handshake")
        parser.set_defaults(memory_type="VRAM")

    def set_up(self):
        options = self.options
        devices = [int(part) for part in options.gpu_devices.split(",") if part.strip()]
        options.gpu_id = devices[0]
        options.target_gpu_id = devices[-1]
        options.backend_params.setdefault("gpu_devices", options.gpu_devices)
        if options.gpunetio_oob_list:
            options.backend_params.setdefault("oob_interface", options.gpunetio_oob_list)
        super().set_up()


if __name__ == "__main__":
    sys.exit(run(GpunetioP2p))
