"""The process's one torch TCPStore for expert-parallel rendezvous. It is needed only while ranks connect: survivors go on
dispatching when the process that serves it is gone."""
import datetime
import logging
import os
import socket
import threading

import torch.distributed as dist

logger = logging.getLogger(__name__)

PORT_VARIABLE, DEFAULT_PORT = "SGLANG_TCP_STORE_PORT", 29600
_store = None
_lock = threading.RLock()


def get_global_tcp_store():
    """The store, or None."""
    return _store


def set_global_tcp_store(store):
    """The store that get_global_tcp_store gives from now on; None: none."""
    global _store
    with _lock:
        _store = store


def _local_address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # sends nothing: asks for the route
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def _address(rank, world_size):
    given = os.environ.get("MASTER_ADDR")
    if given:
        return given
    if world_size == 1:
        return "127.0.0.1"
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("MASTER_ADDR is not set and torch.distributed is not initialised, so rank 0's address cannot be told to "
                           "the others; set MASTER_ADDR")
    told = [_local_address() if rank == 0 else None]
    dist.broadcast_object_list(told, src=0)
    logger.warning("MASTER_ADDR is not set; the store is at rank 0's address %s", told[0])
    return told[0]


def create_global_tcp_store(rank, world_size, timeout_s=300):
    """Makes the process's store, or gives back the one there is. Rank 0 serves it; all others, and ranks that join later, are clients.

    Address: MASTER_ADDR, else rank 0's, broadcast. Port: SGLANG_TCP_STORE_PORT (29600). RuntimeError naming port and variable when rank
    0 cannot have it, or when nobody serves it in time.
    """
    with _lock:
        if _store is not None:
            return _store
        port = int(os.environ.get(PORT_VARIABLE, DEFAULT_PORT))
        address = _address(rank, world_size)
        try:
            store = dist.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False,
                                  timeout=datetime.timedelta(seconds=timeout_s))
        except RuntimeError as error:  # DistNetworkError and its like
            doing = "served" if rank == 0 else "reached"
            raise RuntimeError(f"the store cannot be {doing} at {address}:{port}: {error}; {PORT_VARIABLE} chooses another port") from None
        set_global_tcp_store(store)
        return store
