"""Configuration of an agent."""
from enum import Enum

from . import _bindings as nixlBind


class nixl_thread_sync_t(Enum):
    """Thread modes; every mode is safe from any thread, they may differ in speed."""

    NIXL_THREAD_SYNC_NONE = nixlBind.NIXL_THREAD_SYNC_NONE
    NIXL_THREAD_SYNC_STRICT = nixlBind.NIXL_THREAD_SYNC_STRICT
    NIXL_THREAD_SYNC_RW = nixlBind.NIXL_THREAD_SYNC_RW
    NIXL_THREAD_SYNC_DEFAULT = nixlBind.NIXL_THREAD_SYNC_DEFAULT


def text_of(value):
    """A parameter's value as text: True is "true"."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _checked_params(params):
    if not isinstance(params, dict) or not all(isinstance(given, dict) for given in params.values()):
        raise TypeError("backend_params must be a dict of dicts: {backend: {parameter: value}}")
    return {name: {str(key): text_of(value) for key, value in given.items()} for name, given in params.items()}


def _check_backends(backends):
    if isinstance(backends, str):
        raise TypeError(f"backends is {backends!r}; a list of names is needed, such as [{backends!r}]")


def _check_sync_mode(sync_mode):
    if sync_mode is not None and not isinstance(sync_mode, nixl_thread_sync_t):
        raise TypeError(f"sync_mode must be a nixl_thread_sync_t (got '{type(sync_mode).__name__}')")


class nixl_agent_config:
    """What an agent is made with; every attribute may be changed until the agent is made.

    Arguments:
        enable_prog_thread: a thread makes progress; without it progress happens inside calls only.
        enable_listen_thread, enable_listen: serve metadata to peers on a TCP socket; the two mean the same.
        listen_port: of that socket, 0 for any free one (get_listen_port tells which).
        capture_telemetry: count and time transfers, for get_xfer_telemetry.
        num_threads: worker threads of backends that have some, 0 for their default.
        backends: names to create at once.
        sync_mode: accepted; every mode is safe from any thread.
        backend_params: {backend: {parameter: value}}; nixl.plugin_report() lists the parameters.
        use_etcd: True publishes and discovers by itself, False ignores etcd, None uses it for explicit calls when
            NIXL_ETCD_ENDPOINTS is set.

    Raises:
        ValueError: the two spellings of listening contradict each other.
        TypeError: backends is a str, sync_mode no nixl_thread_sync_t, or backend_params no dict of dicts.
    """

    def __init__(self, enable_prog_thread=True, enable_listen_thread=False, listen_port=nixlBind.DEFAULT_COMM_PORT,
                 capture_telemetry=False, num_threads=0, backends=["UCX"], sync_mode=None, *, backend_params=None,
                 use_etcd=None, enable_listen=None):
        if enable_listen_thread and enable_listen is not None and not enable_listen:
            raise ValueError("enable_listen_thread=True and enable_listen=False contradict each other")
        _check_backends(backends)
        _check_sync_mode(sync_mode)
        self.backends = ["UCX"] if backends is None else list(backends)  # a copy: the default is shown, never handed out
        self.enable_pthread = enable_prog_thread
        self.enable_listen = bool(enable_listen or enable_listen_thread)
        self.port = listen_port
        self.capture_telemetry = capture_telemetry
        self.num_threads = num_threads
        self.sync_mode = sync_mode
        self.backend_params = _checked_params({} if backend_params is None else backend_params)
        self.use_etcd = use_etcd

    enable_prog_thread = property(lambda self: self.enable_pthread, lambda self, value: setattr(self, "enable_pthread", value))
    enable_listen_thread = property(lambda self: self.enable_listen, lambda self, value: setattr(self, "enable_listen", value))
    listen_port = property(lambda self: self.port, lambda self, value: setattr(self, "port", value))


def native_config(conf):
    """The native configuration of a nixl_agent_config, or of whatever has its attributes. They may have been changed since it was
    made, so what its making refuses is refused here too."""
    _check_backends(conf.backends)
    _check_sync_mode(conf.sync_mode)
    _checked_params(getattr(conf, "backend_params", None) or {})
    sync = conf.sync_mode
    if sync is not None:
        mode = sync.value
    else:
        mode = nixlBind.NIXL_THREAD_SYNC_STRICT if conf.enable_listen else nixlBind.NIXL_THREAD_SYNC_NONE
    native = nixlBind.nixlAgentConfig()
    native.useProgThread = bool(conf.enable_pthread)
    native.useListenThread = bool(conf.enable_listen)
    native.listenPort = conf.port
    native.syncMode = mode
    native.captureTelemetry = bool(conf.capture_telemetry)
    native.pthrDelay = 0
    native.lthrDelay = 100000
    use_etcd = getattr(conf, "use_etcd", None)
    if use_etcd not in (None, True, False):
        raise TypeError(f"use_etcd is {use_etcd!r}; True, False or None is needed")
    native.useEtcd = None if use_etcd is None else bool(use_etcd)
    return native
