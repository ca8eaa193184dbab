"""Backend LIBFABRIC as users meet it: by name and by alias, between agents of one process and of two, beside the same-host path."""
import os
import subprocess
import sys

import nixl
import numpy
import pytest
from agents import done, introduce, need_backend, until
from nixl._api import nixl_agent, nixl_agent_config

from test_nixlbench import FEW, rows_of, run

pytestmark = pytest.mark.timeout(100)

NETWORK = {"LIBFABRIC": {"same_host": "false", "provider": "tcp"}}


@pytest.fixture
def pair():
    need_backend("LIBFABRIC")
    agents = [nixl_agent(name, nixl_agent_config(backends=["LIBFABRIC"], backend_params=NETWORK)) for name in ("here", "there")]
    arrays = [numpy.full(1 << 20, fill, numpy.uint8) for fill in (1, 2)]
    for one, array in zip(agents, arrays, strict=True):
        one.register_memory([(array.ctypes.data, array.nbytes, 0, "")], "DRAM")
    introduce(*agents)
    return agents, arrays


def places(array, pieces):
    size = array.nbytes // pieces
    return [(array.ctypes.data + i * size, size, 0) for i in reversed(range(pieces))]


def request(one, operation, arrays, pieces, note=b""):
    local, remote = (one.get_xfer_descs(places(array, pieces), "DRAM") for array in arrays)
    return one.initialize_xfer(operation, local, remote, "there", note)


def test_write_read_and_notifications(pair):
    (here, there), arrays = pair
    handle = request(here, "WRITE", arrays, 64, b"written")
    here.transfer(handle)
    done(here, handle)
    assert until(lambda: there.update_notifs().get("here")) == [b"written"]
    assert (arrays[0] == arrays[1]).all()
    assert here.query_xfer_backend(handle) == "LIBFABRIC"
    assert here.query_xfer_path(handle).startswith("tcp")
    arrays[1][:] = numpy.arange(1 << 20, dtype=numpy.uint32).astype(numpy.uint8)
    handle = request(here, "READ", arrays, 1000)
    here.transfer(handle)
    done(here, handle)
    assert (arrays[0][: 1000 * ((1 << 20) // 1000)] == arrays[1][: 1000 * ((1 << 20) // 1000)]).all()
    there.send_notif("here", b"x" * (1 << 20))
    assert until(lambda: here.update_notifs().get("there")) == [b"x" * (1 << 20)]


def test_costs_are_not_estimated(pair):
    (here, _), arrays = pair
    with pytest.raises(nixl.nixlNotSupportedError):
        here.estimate_xfer_cost(request(here, "WRITE", arrays, 1))


def test_the_same_host_path_takes_over_unless_it_is_switched_off():
    need_backend("LIBFABRIC")
    agents = [nixl_agent(name, nixl_agent_config(backends=["Libfabric"])) for name in ("here", "there")]
    arrays = [numpy.full(4096, fill, numpy.uint8) for fill in (1, 2)]
    for one, array in zip(agents, arrays, strict=True):
        one.register_memory([(array.ctypes.data, array.nbytes, 0, "")], "DRAM")
    introduce(*agents)
    handle = request(agents[0], "WRITE", arrays, 1)
    assert agents[0].query_xfer_backend(handle) == "LIBFABRIC"
    assert not agents[0].query_xfer_path(handle).startswith("tcp")


PEER = """if True:
    import sys, numpy, nixl
    from nixl._api import nixl_agent, nixl_agent_config
    params = {"LIBFABRIC": {"same_host": "false", "provider": "tcp"}}
    one = nixl_agent("there", nixl_agent_config(backends=["LIBFABRIC"], backend_params=params))
    array = numpy.zeros(1 << 20, numpy.uint8)
    one.register_memory([(array.ctypes.data, array.nbytes, 0, "")], "DRAM")
    print(one.get_agent_metadata().hex(), array.ctypes.data, flush=True)
    sys.stdin.read()
"""


def test_killed_peer():
    need_backend("LIBFABRIC")
    here = nixl_agent("here", nixl_agent_config(backends=["LIBFABRIC"], backend_params=NETWORK))
    array = numpy.ones(1 << 20, numpy.uint8)
    here.register_memory([(array.ctypes.data, array.nbytes, 0, "")], "DRAM")
    peer = subprocess.Popen([sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)))
    try:
        metadata, address = peer.stdout.readline().split()
        here.add_remote_agent(bytes.fromhex(metadata))
        local = here.get_xfer_descs([(array.ctypes.data, array.nbytes, 0)], "DRAM")
        remote = here.get_xfer_descs([(int(address), array.nbytes, 0)], "DRAM")
        handle = here.initialize_xfer("WRITE", local, remote, "there")
        here.transfer(handle)
        done(here, handle)
    finally:
        peer.kill()
        peer.communicate()
    with pytest.raises(nixl.nixlRemoteDisconnectError) as raised:
        for _ in range(1000):  # what was sent before the kernel knew of the death may still look done
            here.transfer(handle)
            done(here, handle)
    assert "there" in str(raised.value)


def test_nixlbench():
    need_backend("LIBFABRIC")
    code, out, err = run("nixlbench.py", "--backend", "LIBFABRIC", "--start_block_size", "4096", "--max_block_size", "8192",
                         "--check_consistency", *FEW)
    assert code == 0, err
    assert [row["Block Size (B)"] for row in rows_of(out)] == [4096, 8192]
