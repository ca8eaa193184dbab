"""Names, imports and configuration (PY-1 to PY-28)."""
import enum
import inspect
import logging
import os
import subprocess
import sys

import nixl
import nixl._api as api
import nixl._bindings as bindings
import pytest
from agents import agent

EXCEPTIONS = ("NotPosted InvalidParam Backend NotFound Mismatch NotAllowed RepostActive Unknown NotSupported RemoteDisconnect "
              "Cancelled NoTelemetry").split()


def test_submodule_names_are_package_names():
    import nixl._utils
    import nixl.logging
    for module in (api, bindings, nixl._utils, nixl.logging):
        for name in vars(module):
            if not name.startswith("_"):
                assert hasattr(nixl, name), f"nixl.{name} of {module.__name__}"
    for name in ("nixl_agent nixl_agent_config nixl_prepped_dlist_handle nixl_xfer_handle nixl_backend_handle nixl_thread_sync_t "
                 "DEFAULT_COMM_PORT nixlBind logger np pickle").split():
        assert hasattr(api, name)
    assert api.nixl_backend_handle is int and api.DEFAULT_COMM_PORT == 8888 and nixl.nixl_thread_sync_t is api.nixl_thread_sync_t
    assert nixl.nixl_agent is api.nixl_agent and nixl.malloc_passthru and nixl.get_logger and nixl.DRAM_SEG == 0


def test_import_is_free_of_side_effects():
    code = ("import logging, sys, os; before = dict(os.environ); import nixl, nixl._api, nixl._bindings, nixl._utils, nixl.logging\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
            "assert logging.raiseExceptions and dict(os.environ) == before\n"
            "assert not any('libcuda' in line for line in open('/proc/self/maps'))")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_import_once_more():
    """A test that put sys.modules back (unittest.mock.patch.dict) makes the next import a second one; both packages work."""
    code = ("import os, sys; os.environ['NIXL_LOOPBACK'] = 'y'; import nixl, numpy as np\n"
            "def use(nixl):\n"
            "    one = nixl.nixl_agent('a', nixl.nixl_agent_config(backends=['LOOPBACK']))\n"
            "    memory = np.zeros(8, np.uint8); one.register_memory([memory]); descs = one.get_xfer_descs([memory])\n"
            "    handle = one.initialize_xfer('WRITE', descs, descs, 'a'); one.transfer(handle)\n"
            "    assert handle.wait(5) == 'DONE' and one.check_xfer_state(handle) == 'DONE'\n"
            "    try: one.send_notif('b', b'')\n"
            "    except nixl.nixlNotFoundError: return descs\n"
            "for name in [name for name in sys.modules if name.partition('.')[0] == 'nixl']: del sys.modules[name]\n"
            "first = nixl; import nixl\n"
            "assert nixl is not first and use(first) and use(nixl) and nixl.nixl_status_t is first.nixl_status_t")
    ended = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_import_warns_of_other_owners_of_our_files(tmp_path):
    from nixl._installed import others
    for name in ("nixl_cu12-1.4.0.dist-info", "nixl-1.4.0.dist-info", "nixl_ep-1.4.1.dist-info", "nixlike-1.0.dist-info"):
        (tmp_path / name).mkdir()
    code = "import sys; sys.path.append(%r); import nixl" % str(tmp_path)
    out = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True).stdout
    assert all(f"distribution {name} owns" in out for name in ("nixl", "nixl-cu12", "nixl-ep")) and "nixlike" not in out
    assert others([str(tmp_path)]) == ["nixl", "nixl-cu12", "nixl-ep"]
    (tmp_path / "nixl-1.4.0.dist-info" / "RECORD").write_text("nixl/_installed.py,sha256=x,1\n")  # that is our own
    assert others([str(tmp_path)]) == ["nixl-cu12", "nixl-ep"] and others([str(tmp_path / "none")]) == []


@pytest.mark.parametrize("alias", ["nixl_cu12", "nixl_cu13"])
def test_aliases(alias):
    package = __import__(alias)
    for name in ("nixl_agent", "nixl_agent_config", "nixl_xfer_handle", "__version__", "np"):
        assert getattr(package, name) is getattr(nixl, name)
    assert __import__(alias + "._api", fromlist=["x"]) is api


def test_enums_equal_integers():
    assert [int(getattr(bindings, name)) for name in ("DRAM_SEG", "VRAM_SEG", "BLK_SEG", "OBJ_SEG", "FILE_SEG")] == [0, 1, 2, 3, 4]
    assert bindings.NIXL_READ == 0 and bindings.NIXL_WRITE == 1 and bindings.nixl_mem_t.FILE_SEG == 4
    assert bindings.NIXL_IN_PROG == 1 and bindings.NIXL_ERR_NO_TELEMETRY == -12 and bindings.NIXL_COST_ANALYTICAL_BACKEND == 0
    assert bindings.NIXL_THREAD_SYNC_DEFAULT == bindings.NIXL_THREAD_SYNC_NONE == 0 and bindings.NIXL_INIT_AGENT == ""
    assert isinstance(bindings.HAVE_UCX_GPU_DEVICE_API, bool)


def test_exceptions():
    for number, name in enumerate(EXCEPTIONS, 1):
        kind = getattr(bindings, f"nixl{name}Error")
        assert issubclass(kind, bindings.nixlError) and kind.status == -number
        error = kind("because")
        assert str(error).startswith("NIXL_ERR_") and str(error).endswith(": because") and error.reason == "because"


def test_thread_modes():
    sync = api.nixl_thread_sync_t
    assert issubclass(sync, enum.Enum)
    assert [one.name for one in sync] == ["NIXL_THREAD_SYNC_NONE", "NIXL_THREAD_SYNC_STRICT", "NIXL_THREAD_SYNC_RW"]
    assert sync.NIXL_THREAD_SYNC_DEFAULT is sync.NIXL_THREAD_SYNC_NONE
    assert sync.NIXL_THREAD_SYNC_RW.value is bindings.nixl_thread_sync_t.NIXL_THREAD_SYNC_RW
    with pytest.raises(TypeError, match=r"sync_mode must be a nixl_thread_sync_t \(got 'int'\)"):
        api.nixl_agent_config(sync_mode=1)


@pytest.mark.parametrize("listen", [False, True])
@pytest.mark.parametrize("mode", [None, *api.nixl_thread_sync_t])
def test_native_configuration(monkeypatch, mode, listen):
    seen = []
    native = bindings.nixlAgent

    def spy(name, config):
        seen.append(config)
        return native(name, config)

    monkeypatch.setattr(bindings, "nixlAgent", spy)
    made = api.nixl_agent("spied", api.nixl_agent_config(enable_listen_thread=listen, listen_port=0, backends=[], sync_mode=mode))
    strict = bindings.NIXL_THREAD_SYNC_STRICT if listen else bindings.NIXL_THREAD_SYNC_NONE
    assert seen[0].syncMode == (strict if mode is None else mode.value)
    assert (seen[0].pthrDelay, seen[0].lthrDelay) == (0, 100000)
    assert bool(made.get_listen_port()) == listen


def test_native_configuration_defaults():
    import datetime
    config = bindings.nixlAgentConfig(False, True, 5, bindings.NIXL_THREAD_SYNC_RW, 3, 10, 20, True)
    assert (config.useProgThread, config.useListenThread, config.listenPort, config.captureTelemetry) == (False, True, 5, True)
    assert config.syncMode == bindings.NIXL_THREAD_SYNC_RW and config.etcdWatchTimeout == datetime.timedelta(seconds=5)


def test_config_arguments():
    config = api.nixl_agent_config(True, True, 5555)
    assert (config.enable_pthread, config.enable_listen, config.port) == (True, True, 5555)
    assert config.backends == ["UCX"] and config.num_threads == 0 and config.capture_telemetry is False
    config.backends.append("POSIX")
    assert api.nixl_agent_config().backends == ["UCX"]
    assert api.nixl_agent_config(enable_listen=True, listen_port=7).enable_listen_thread
    with pytest.raises(ValueError, match="enable_listen"):
        api.nixl_agent_config(enable_listen_thread=True, enable_listen=False)
    with pytest.raises(TypeError, match="dict of dicts"):
        api.nixl_agent_config(backend_params={"UCX": "tcp"})
    assert api.nixl_agent_config(backend_params={"UCX": {"a": True, "b": 3}}).backend_params == {"UCX": {"a": "true", "b": "3"}}
    for name, value in dict(backends=[], enable_pthread=False, enable_listen=False, port=1, capture_telemetry=True, num_threads=2,
                            sync_mode=None, enable_prog_thread=False, enable_listen_thread=False, listen_port=2).items():
        setattr(config, name, value)
        assert getattr(config, name) == value
    assert config.port == 2 and config.enable_pthread is False


def test_signature_shows_the_default_backend():
    """PY-10: tools and people read the signature."""
    parameters = inspect.signature(api.nixl_agent_config).parameters
    assert parameters["backends"].default == ["UCX"] and api.nixl_agent_config(backends=None).backends == ["UCX"]
    assert [one.default for one in parameters.values()] == [True, False, 8888, False, 0, ["UCX"], None, None, None, None]
    api.nixl_agent_config().backends.append("POSIX")
    assert parameters["backends"].default == ["UCX"]


@pytest.mark.parametrize("kind", [api.nixl_prepped_dlist_handle, api.nixl_xfer_handle])
def test_handle_classes(kind):
    assert kind.__slots__ == ("_handle", "_agent", "_released") and not hasattr(kind, "__len__")
    assert not isinstance(kind(None, 7), api.nixl_xfer_handle if kind is api.nixl_prepped_dlist_handle
                          else api.nixl_prepped_dlist_handle)
    assert repr(kind(agent=None, value=255)) == f"<{kind.__name__} 0xff released=False>"


def test_native_calls_return_statuses():
    """Section 9: statuses come back, errors are raised."""
    a, b = agent("a"), agent("b")
    a.add_remote_agent(b.get_agent_metadata())
    success = bindings.NIXL_SUCCESS
    assert a.agent.makeConnection("b") is success and a.agent.genNotif("b", b"x") is success
    for call in (a.agent.sendLocalMD, a.agent.invalidateLocalMD):
        assert call("127.0.0.1", 1) is success
    assert a.agent.fetchRemoteMD("b", "127.0.0.1", 1) is success
    assert a.agent.sendLocalPartialMD(bindings.nixlRegDList(bindings.DRAM_SEG), True, [], "127.0.0.1", 1) is success


def test_etcd_needs_its_variable(monkeypatch):
    monkeypatch.delenv("NIXL_ETCD_ENDPOINTS", raising=False)
    with pytest.raises(RuntimeError, match="NIXL_ETCD_ENDPOINTS"):
        api.nixl_agent("a", api.nixl_agent_config(backends=[], use_etcd=True))


def test_two_stores_are_refused(monkeypatch):
    monkeypatch.setenv("NIXL_ETCD_ENDPOINTS", "http://127.0.0.1:1")
    monkeypatch.setenv("NIXL_TCPSTORE_ENDPOINT", "127.0.0.1:1")
    with pytest.raises(RuntimeError, match="both"):
        api.nixl_agent("a", api.nixl_agent_config(backends=[]))


def test_configuration_file(monkeypatch, tmp_path):
    path = tmp_path / "nixl.cfg"
    monkeypatch.setenv("NIXL_CONFIG_FILE", str(path))
    with pytest.raises(RuntimeError, match="cannot be read"):
        api.nixl_agent("a", api.nixl_agent_config(backends=[]))
    path.write_text('# comment\nNIXL_TELEMETRY_ENABLE = "y"  # on\nNIXL_TELEMETRY_EXPORTER = "nonsense"\n[other]\nx = 1\n')
    with pytest.raises(RuntimeError, match="nonsense"):
        api.nixl_agent("a", api.nixl_agent_config(backends=[]))
    path.write_text("NIXL_TELEMETRY_ENABLE = \n")
    with pytest.raises(RuntimeError, match="line 1"):
        api.nixl_agent("a", api.nixl_agent_config(backends=[]))


def test_empty_name():
    for name in ("", b""):
        with pytest.raises(ValueError):
            api.nixl_agent(name)


def test_unknown_names_on_an_agent_without_backends():
    one = api.nixl_agent("a", api.nixl_agent_config(backends=[]))
    for op in ("RD", "WR", 0, None):
        with pytest.raises(KeyError):
            one.initialize_xfer(op, [], [], "b")
        with pytest.raises(KeyError):
            one.make_prepped_xfer(op, 0, [], 0, [])
    assert one.get_plugin_mem_types("UVX") == [] and one.get_plugin_params("UVX") == {}
    assert one.get_backend_mem_types("UCX") == [] and one.get_backend_params("UCX") == {}
    for name in ("UVX", "ucx"):
        with pytest.raises(nixl.nixlNotFoundError, match=name):
            one.create_backend(name)
    with pytest.raises(KeyError):
        one.send_notif("b", b"x", backend="UCX")
    with pytest.raises(nixl.nixlNotFoundError):
        one.register_memory([(4096, 64, 0)], "DRAM")


def test_unavailable_backend_is_skipped_with_its_reason(caplog):
    missing = next(name for name, about in nixl.plugin_report().items() if not about["available"])
    logger = logging.getLogger("nixl")
    logger.addHandler(caplog.handler)
    try:
        one = api.nixl_agent("a", api.nixl_agent_config(backends=[missing, "LOOPBACK"]))
    finally:
        logger.removeHandler(caplog.handler)
    assert list(one.backends) == ["LOOPBACK"]
    assert any(missing in record.getMessage() and nixl.plugin_report()[missing]["reason"] in record.getMessage()
               for record in caplog.records if record.levelname == "WARNING")
    with pytest.raises(nixl.nixlNotFoundError, match="not available"):
        one.create_backend(missing)
    with pytest.raises(nixl.nixlNotFoundError, match=f"{missing} was skipped: "):
        one.register_memory([(0, 64, 1)], "VRAM")
    with pytest.raises(nixl.nixlNotFoundError, match=f"{missing} was skipped: "):
        one.prep_xfer_dlist("", [(0, 64, 1)], "VRAM")
    listed = one.get_xfer_descs([(0, 64, 1)], "VRAM")
    with pytest.raises(nixl.nixlNotFoundError, match=f"{missing} was skipped: "):
        one.initialize_xfer("WRITE", listed, listed, "a")


def test_backend_creation_errors():
    one = agent("a")
    with pytest.raises(nixl.nixlInvalidParamError, match="exists already"):
        one.create_backend("LOOPBACK")
    other = api.nixl_agent("b", api.nixl_agent_config(backends=[], backend_params={"LOOPBACK": {"delay_us": "soon"}}))
    with pytest.raises(nixl.nixlBackendError, match="delay_us"):
        other.create_backend("LOOPBACK")
    other.create_backend("LOOPBACK", {"delay_us": 5})
    assert other.get_backend_params("LOOPBACK")["delay_us"] == "5"
    assert other.get_backend_mem_types("LOOPBACK") == ["DRAM_SEG"]


def test_params_come_back_unedited():
    one = api.nixl_agent("a", api.nixl_agent_config(backends=[]))
    for name in one.get_plugin_list():
        if name in ("LOOPBACK", "UCX", "POSIX"):
            one.create_backend(name, one.get_plugin_params(name))


def test_report_covers_every_backend():
    names = "UCX UCX_MO GPUNETIO Mooncake LIBFABRIC GDS GDS_MT POSIX HF3FS OBJ GUSLI AZURE_BLOB UCCL INFINIA".split()
    report = nixl.plugin_report()
    for name in names:
        line = report[name]
        assert set(line) == {"available", "reason", "mem_types", "remote", "local", "notif", "params"}
        assert line["available"] or line["reason"]
        assert line["mem_types"] and (line["remote"] or line["local"])
    assert agent("a").get_plugin_report().keys() == report.keys()


@pytest.mark.parametrize("alias,name", [("MOONCAKE", "Mooncake"), ("Libfabric", "LIBFABRIC")])
def test_other_spellings(alias, name):
    """PY-24: both spellings lead to the same backend, or to the same reason why it is not here."""
    about = nixl.plugin_report()[name]
    if about["available"]:
        backends = api.nixl_agent("a", api.nixl_agent_config(backends=[alias])).backends
        assert alias in backends and backends[alias] == backends[name]
        return
    one = api.nixl_agent("a", api.nixl_agent_config(backends=[alias]))
    for spelling in (alias, name):
        with pytest.raises(nixl.nixlNotFoundError) as raised:
            one.create_backend(spelling)
        assert about["reason"] in raised.value.reason
    with pytest.raises(nixl.nixlNotFoundError) as raised:
        one.register_memory([(0, 64, 1)], "DRAM")
    assert about["reason"] in raised.value.reason  # and not "there is no backend of this name"


DEFAULTS = {
    "GPUNETIO": {"network_devices": "", "oob_interface": "", "gpu_devices": "", "cuda_streams": ""},
    "Mooncake": {"mooncake_devices": "", "protocol": "auto"},
    "LIBFABRIC": {"num_threads": "0", "split_batch_size": "1024", "striping_threshold": "131072", "max_bw_per_dram_seg": "0",
                  "post_queue_size": "32768", "provider": "auto"},
    "GDS": {"batch_pool_size": "16", "batch_limit": "128", "max_request_size": "16777216"},
    "GDS_MT": {"thread_count": str(max(1, os.cpu_count() // 2))},
    "POSIX": {"use_uring": "false", "use_aio": "false", "use_posix_aio": "false", "ios_pool_size": "65536", "kernel_queue_size": "256"},
    "HF3FS": {"mount_point": "/mnt/3fs/", "mem_config": "auto", "iopool_size": "64"},
    "OBJ": {"bucket": "", "endpoint_override": "", "scheme": "https", "use_virtual_addressing": "false", "crtMinLimit": "0",
            "accelerated": "false", "type": "", "num_threads": str(max(1, os.cpu_count() // 2))},
    "GUSLI": {"client_name": "", "max_num_simultaneous_requests": "256", "config_file": "", "try_use_uring": "false"},
    "AZURE_BLOB": {"account_url": "", "container_name": "", "connection_string": "", "ca_bundle": ""},
    "UCCL": {"in_python": "true", "num_cpus": "4"},
    "INFINIA": {"cluster": "cluster1", "tenant": "red", "subtenant": "red", "dataset": "red", "sthreads": "8", "num_buffers": "512",
                "num_ring_entries": "512", "coremasks": "0x2", "max_retries": "", "config_file": ""},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_report_names_every_parameter_and_its_default(name):
    """PY-28, also of a backend that cannot be used here."""
    params = nixl.plugin_report()[name]["params"]
    assert {key: params.get(key) for key in DEFAULTS[name]} == DEFAULTS[name]


def test_bad_plugin_directory_hides_nothing(monkeypatch):
    monkeypatch.setenv("NIXL_PLUGIN_DIR", "/nonexistent/plugins")
    assert "LOOPBACK" in agent("a").get_plugin_list()


def test_logging_module(capsys):
    from nixl.logging import LOGGING_CONFIG, get_logger, set_log_level_by_env
    assert get_logger("__x").name == "nixl.x" and LOGGING_CONFIG["loggers"]["nixl"]["propagate"] is False
    code = ("import os; os.environ['NIXL_LOG_LEVEL'] = 'bogus'\nfrom nixl.logging import get_logger\n"
            "get_logger('x').info('hello'); import logging; logging.getLogger('nixl').setLevel(30); get_logger('x').info('hidden')")
    out = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True).stdout
    assert "bogus" in out and "NIXL INFO    " in out and "hello" in out and "hidden" not in out
    assert set_log_level_by_env
