import numpy as np
import pytest
from agents import agent, introduce


@pytest.fixture(params=["LOOPBACK", "UCX"])
def pair(request):
    """Two agents that know each other, each with 64 KiB registered in `memory`."""
    two = [agent(name, request.param) for name in ("alice", "bob")]
    for number, one in enumerate(two):
        one.memory = np.full(1 << 16, number + 1, np.uint8)
        one.regs = one.register_memory([one.memory])
    introduce(*two)
    yield two
