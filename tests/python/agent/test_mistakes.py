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
    (lambda: nixl_agent("x", nixl_agent_config(backends=[1])), TypeError, "a backend's name is 1; text such as 'UCX' is needed"),
    (lambda: nixl_agent("x", nixl_agent_config(listen_port=70000)), ValueError,
     "listenPort is 70000; an integer from 0 to 65535 is needed"),
    (lambda: nixl_agent("x", nixl_agent_config(listen_port="8888")), TypeError, "listenPort is '8888'; an integer"),
    (lambda: nixl_agent("x", nixl_agent_config(use_etcd="yes")), TypeError, "use_etcd is 'yes'; True, False or None"),
    (lambda: nixl_agent("x" * 4097), ValueError, "the agent's name has 4097 bytes; at most 4096 are allowed"),
])
def test_configuration(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("name, value, text", [
    ("backends", "UCX", "backends is 'UCX'; a list of names is needed"),
    ("sync_mode", 1, r"sync_mode must be a nixl_thread_sync_t \(got 'int'\)"),
    ("backend_params", {"UCX": "tcp"}, "backend_params must be a dict of dicts"),
])
def test_a_configuration_that_was_changed(name, value, text):
    config = nixl_agent_config(backends=[])
    setattr(config, name, value)
    with pytest.raises(TypeError, match=text):
        nixl_agent("x", config)


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


@pytest.mark.parametrize("call, error, text", [
    (lambda a: a.create_backend(None), TypeError, "a backend's name is None; text such as 'UCX' is needed"),
    (lambda a: a.create_backend("POSIX", ["use_aio"]), TypeError, r"initParams is \['use_aio'\]; a dict"),
    (lambda a: a.register_memory(np.zeros((1, 3), np.int64), "DRAM", "UCX"), TypeError,
     r"backends is 'UCX'; a list of names is needed, such as \['UCX'\]"),
    (lambda a: a.register_memory([(4096, -2, 0)], "DRAM"), ValueError,
     r"len of a descriptor is -2; an integer from 0 to 2\*\*64 - 1 is needed"),
    (lambda a: a.get_xfer_descs([(1.5, 2, 0)], "DRAM"), TypeError, "addr of a descriptor is 1.5; an integer"),
    (lambda a: a.register_memory([(4096, 1, 0), (2**64 - 8, 9, 0)], "DRAM"), nixl.nixlInvalidParamError,
     "descriptor 1 .* reaches beyond the last 64-bit address"),
    (lambda a: a.transfer(None), TypeError, "a handle that this package returned is needed, not None"),
    (lambda a: a.check_xfer_state(7), TypeError, "a handle that this package returned is needed, not 7"),
    (lambda a: a.release_xfer_handle(0), TypeError, "a handle that this package returned is needed, not 0"),
    (lambda a: a.prep_xfer_dlist(None, nixl.nixlXferDList(nixl.DRAM_SEG)), TypeError, "must be str or bytes, not NoneType"),
    (lambda a: a.add_remote_agent(None), TypeError, "metadata must be str or bytes, not NoneType"),
    (lambda a: a.send_local_metadata("127.0.0.1", 99999), ValueError, "port is 99999; an integer from 0 to 65535"),
    (lambda a: a.check_remote_xfer_done("x", 5), TypeError, "a message is 5; str or bytes are needed"),
    (lambda a: a.deserialize_descs(None), TypeError, "serialized descriptors are None; bytes are needed"),
    (lambda a: nixl.malloc_passthru(-1), ValueError, "size is -1; 0 or more bytes are allowed"),
    (lambda a: nixl.malloc_passthru(1 << 60), MemoryError, "cannot be allocated: Cannot allocate memory"),
    (lambda a: nixl.free_passthru("text"), TypeError, "str"),
])
def test_wrong_arguments(agent, call, error, text):
    with pytest.raises(error, match=text):
        call(agent)


@pytest.mark.parametrize("indices, error, text", [
    (None, TypeError, "indices must be a list of integers or a one-dimensional array"),
    (np.zeros(1), ValueError, "indices must be integers; the array's format is 'd'"),
    (np.zeros((1, 1), int), ValueError, "one-dimensional; the array has 2 dimensions"),
])
def test_wrong_indices(agent, indices, error, text):
    memory = np.zeros(8, np.uint8)
    agent.register_memory([memory])
    sides = [agent.prep_xfer_dlist(name, agent.get_xfer_descs([memory])) for name in ("", "mistaken")]
    with pytest.raises(error, match=text):
        agent.make_prepped_xfer("WRITE", sides[0], indices, sides[1], [0])


def test_the_backend_that_was_asked_is_named():
    agent = nixl_agent("asked", nixl_agent_config(backends=["POSIX"]))
    memory = np.zeros(8, np.uint8)
    agent.register_memory([memory])
    with pytest.raises(nixl.nixlNotFoundError, match=r"no backend takes this kind of memory \(asked: POSIX\)"):
        agent.prep_xfer_dlist("", [(0, 8, 0)], "OBJ")
    peer = nixl_agent("peer", nixl_agent_config(backends=["UCX"]))
    agent.create_backend("UCX")
    agent.add_remote_agent(peer.get_agent_metadata())
    with pytest.raises(nixl.nixlBackendError, match=r"carries notifications \(asked: POSIX\)"):
        agent.send_notif("peer", b"x", "POSIX")
    with pytest.raises(nixl.nixlNotFoundError, match=r"no backend is connected to it \(asked: POSIX\)"):
        agent.initialize_xfer("WRITE", [memory], [memory], "peer", backends=["POSIX"])
    agent.register_memory([memory], backends=["UCX"])
    with pytest.raises(nixl.nixlNotFoundError, match="descriptor 1 .* is not registered exactly as given"):
        agent.get_partial_agent_metadata([memory, np.zeros(3)])


@pytest.mark.parametrize("variables, params, text", [
    ({"NIXL_SAME_HOST": "maybe"}, {}, "NIXL_SAME_HOST is 'maybe'; allowed: y yes"),
    ({}, {"same_host": "maybe"}, "parameter same_host is 'maybe'; allowed: y yes"),
])
def test_words_that_are_neither_yes_nor_no(agent, monkeypatch, variables, params, text):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(nixl.nixlInvalidParamError, match=text):
        agent.create_backend("UCX", params)
    assert "UCX" not in agent.backends
    monkeypatch.undo()
    agent.create_backend("UCX")


@pytest.mark.parametrize("path", ["/", "/nowhere/nixl.toml"])
def test_a_configuration_file_that_is_none(monkeypatch, path):
    monkeypatch.setenv("NIXL_CONFIG_FILE", path)
    with pytest.raises(RuntimeError, match=f"NIXL_CONFIG_FILE={path} cannot be read; the path of a TOML file"):
        nixl_agent("configured", nixl_agent_config(backends=[]))


def test_a_list_of_very_many_zeros_takes_no_time():
    assert nixl.nixlXferDList(nixl.DRAM_SEG, 10**13).descCount() == 10**13


def test_a_handle_after_its_release(agent):
    memory = np.zeros(8, np.uint8)
    agent.register_memory([memory])
    descs = agent.get_xfer_descs([memory])
    handle = agent.initialize_xfer("WRITE", descs, descs, "mistaken")
    number = handle._handle
    agent.release_xfer_handle(handle)
    with pytest.raises(nixl.nixlInvalidParamError, match="it was released, or another agent made it"):
        agent.agent.postXferReq(number)
