"""Large requests shared out among the threads of UCX's num_threads, between two processes over TCP."""
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
import zlib

import nixl
import numpy as np
import pytest
from agents import agent

BLOCKS, LENGTH = 2000, 2048
PARAMS = {"UCX": {"same_host": "false", "UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo", "split_batch_size": "16"}}

# Answers every message at once with the first and last byte of each block as it sees them then.
PEER = textwrap.dedent(f"""
    import select, os, zlib
    import numpy as np
    from nixl._api import nixl_agent, nixl_agent_config
    one = nixl_agent("peer", nixl_agent_config(backends=["UCX"], num_threads=2, backend_params={PARAMS!r}))
    memory = np.arange({BLOCKS * LENGTH}, dtype=np.uint32).astype(np.uint8)
    one.register_memory([memory])
    print(one.get_agent_metadata().hex(), memory.ctypes.data, flush=True)
    events = one.event_fd()
    while True:
        for messages in one.get_new_notifs().values():
            for message in messages:
                print(message.decode(), zlib.crc32(memory), flush=True)
        select.select([events], [], [])
        os.read(events, 8)
""")


@pytest.fixture
def pair():
    env = dict(os.environ, NIXL_LOG_LEVEL="ERROR")
    process = subprocess.Popen([sys.executable, "-c", PEER], stdout=subprocess.PIPE, text=True, env=env)
    try:
        blob, address = process.stdout.readline().split()
        one = agent("one", "UCX", num_threads=2, capture_telemetry=True, backend_params=PARAMS)
        one.memory = np.zeros(BLOCKS * LENGTH, np.uint8)
        one.register_memory([one.memory])
        one.add_remote_agent(bytes.fromhex(blob))
        yield one, int(address), process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def scattered(one, address, operation, seed=3):
    """Block i here with block order[i] there."""
    order = np.random.default_rng(seed).permutation(BLOCKS)
    row = lambda base, index: np.column_stack([base + index * LENGTH, np.full(BLOCKS, LENGTH), np.zeros(BLOCKS)]).astype(np.uint64)
    local = one.get_xfer_descs(row(one.memory.ctypes.data, np.arange(BLOCKS)), "DRAM")
    remote = one.get_xfer_descs(row(address, order), "DRAM")
    return one.initialize_xfer(operation, local, remote, "peer"), order


def test_bytes_and_the_message_after_all_of_them(pair):
    one, address, process = pair
    read, order = scattered(one, address, "READ")
    one.transfer(read)
    assert read.wait(20) == "DONE"
    there = np.arange(BLOCKS * LENGTH, dtype=np.uint32).astype(np.uint8).reshape(BLOCKS, LENGTH)
    assert (one.memory.reshape(BLOCKS, LENGTH) == there[order]).all()
    write, order = scattered(one, address, "WRITE", seed=4)
    random = np.random.default_rng(5)
    for round_ in range(20):
        one.memory[:] = random.integers(0, 256, one.memory.size, np.uint8)
        there[order] = one.memory.reshape(BLOCKS, LENGTH)
        one.transfer(write, f"round-{round_}".encode())
        if round_ % 2:
            assert write.wait(20) == "DONE"
        else:
            events = one.event_fd()
            while one.check_xfer_state(write) != "DONE":
                assert select.select([events], [], [], 20)[0]
                os.read(events, 8)
        name, seen = process.stdout.readline().split()
        assert name == f"round-{round_}" and int(seen) == zlib.crc32(there.tobytes()), "the message came before the data"
    assert one.get_xfer_telemetry(write).descCount == BLOCKS


def test_a_killed_peer_ends_every_share(pair):
    one, address, process = pair
    handle, _ = scattered(one, address, "WRITE")
    one.transfer(handle)
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    with pytest.raises(nixl.nixlRemoteDisconnectError):
        while time.monotonic() < deadline:
            if one.check_xfer_state(handle) == "DONE":
                one.transfer(handle)
    handle.release()


def test_a_stopped_peer_and_cancel(pair):
    one, address, process = pair
    process.send_signal(signal.SIGSTOP)
    try:
        handle, _ = scattered(one, address, "READ")
        assert one.transfer(handle) == "PROC"
        with pytest.raises((nixl.nixlCancelledError, nixl.nixlRepostActiveError)):
            one.cancel_xfer(handle)
            one.check_xfer_state(handle)
    finally:
        process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + 20
    while True:
        try:
            handle.release()
            break
        except nixl.nixlRepostActiveError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    again, order = scattered(one, address, "READ")
    one.transfer(again)
    assert again.wait(20) == "DONE"
