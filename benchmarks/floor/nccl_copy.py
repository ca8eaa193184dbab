"""What NCCL, through torch.distributed, gives between two GPUs of this host: one piece sent as it is, and lists gathered
into one piece, sent, and scattered, since it has no lists. Prints one JSON object, GB/s by case. Exit code 77 without two GPUs,
torch with CUDA and NCCL."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time

BYTES = 1 << 30
LISTS = [(1000, 64 << 10), (10_000, 16 << 10), (100_000, 4 << 10), (100_000, 1 << 10)]
REPETITIONS = 10


def rank_main(rank, port):
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    memory = torch.zeros(BYTES, dtype=torch.uint8, device="cuda")

    def best(body):
        least = 1e9
        for _ in range(REPETITIONS + 2):
            dist.barrier()
            torch.cuda.synchronize()
            start = time.perf_counter()
            body()
            torch.cuda.synchronize()
            least = min(least, time.perf_counter() - start)
        return least

    def move(data):
        dist.send(data, 1) if rank == 0 else dist.recv(data, 0)

    figures = {f"1x{BYTES}": BYTES / best(lambda: move(memory)) / 1e9}
    for count, piece in LISTS:
        rows = memory[: count * piece].view(torch.int64).view(count, piece // 8)
        order = torch.randperm(count, device="cuda")

        def scattered(rows=rows, order=order):
            packed = rows[order] if rank == 0 else torch.empty_like(rows)
            move(packed)
            if rank == 1:
                rows[order] = packed

        figures[f"{count}x{piece}"] = count * piece / best(scattered) / 1e9
    if rank == 1:  # who has the data last
        print(json.dumps(figures), flush=True)
    dist.destroy_process_group()


def main():
    if len(sys.argv) == 3:
        return rank_main(int(sys.argv[1]), int(sys.argv[2]))
    if importlib.util.find_spec("torch") is None:
        print("SKIP: NCCL: there is no torch", file=sys.stderr)
        return 77
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() < 2 or not torch.distributed.is_nccl_available():
        print("SKIP: NCCL: torch with CUDA and NCCL and two GPUs are needed", file=sys.stderr)
        return 77
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0")}
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(port)], env=environment) for rank in (0, 1)]
    return max(process.wait() for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
