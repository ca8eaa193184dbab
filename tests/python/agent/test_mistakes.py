"""What a program is told when it asks for something that cannot be: the text names what was seen and what is allowed."""
import logging

import nixl
import numpy as np
import pytest
from agents import need_backend
from nixl._api import nixl_agent, nixl_agent_config


@pytest.fixture
def agent():
    need_backend("LOOPBACK")
    return nixl_agent("mistaken", nixl_agent_config(backends=["LOOPBACK"]))


@pytest.mark.parametrize("make, error, text", [
    (lambda: nixl_agent_config(backends="UCX"), TypeError, r"backends is 'UCX'; a list of names is needed"),
    (lambda: nixl_agent("x", {"backends": ["UCX"]}), TypeError, "nixl_conf is a dict; a nixl_agent_config is needed"),
])
def test_configuration(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_skipped_backend_is_told_the_known_ones(caplog):
    logger = logging.getLogger("nixl")
    logger.addHandler(caplog.handler)
    try:
        nixl_agent("lower", nixl_agent_config(backends=["posix"]))
    finally:
        logger.removeHandler(caplog.handler)
    assert any("there is no backend of this name; known: " in line and "POSIX" in line for line in caplog.messages)


@pytest.mark.parametrize("call, text", [
    (lambda a: a.register_memory([(4096, 8, 0, "")], "RAM"), "memory type 'RAM' is unknown; known: DRAM, VRAM"),
    (lambda a: a.initialize_xfer("COPY", None, None, "b"), "operation 'COPY' is unknown; known: WRITE, READ"),
    (lambda a: a.register_memory(np.zeros((1, 3), np.int64), "DRAM", ["UCX"]),
     "backend 'UCX' was not created by this agent; created: LOOPBACK"),
])
def test_unknown_names(agent, call, text):
    with pytest.raises(KeyError, match=text):
        call(agent)


def test_memory_that_no_backend_takes(agent):
    with pytest.raises(nixl.nixlNotFoundError, match=r"registers OBJ_SEG here; it has LOOPBACK \(DRAM_SEG"):
        agent.register_memory([(0, 8, 1, "key")], "OBJ")


def test_a_handle_after_its_release(agent):
    memory = np.zeros(8, np.uint8)
    agent.register_memory([memory])
    descs = agent.get_xfer_descs([memory])
    handle = agent.initialize_xfer("WRITE", descs, descs, "mistaken")
    number = handle._handle
    agent.release_xfer_handle(handle)
    with pytest.raises(nixl.nixlInvalidParamError, match="it was released, or another agent made it"):
        agent.agent.postXferReq(number)
