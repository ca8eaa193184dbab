"""The torch TCPStore through which ranks find each other."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist


def master_store(port: int = 9999, timeout_s: float = 300) -> dist.TCPStore:
    """The server's side; port 0 takes a free one, see `.port`. Keep it until the last rank has left."""
    return dist.TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def client_store(address: str, port: int = 9999, timeout_s: float = 300) -> dist.TCPStore:
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
