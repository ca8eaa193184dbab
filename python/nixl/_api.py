"""The agent as programs use it: names and strings instead of numbers, tensors and arrays instead of addresses."""
from __future__ import annotations as _annotations

import functools as _functools
import pickle
import threading as _threading

from . import _bindings as nixlBind
from . import _descs, _native
from ._bindings import DEFAULT_COMM_PORT
from ._config import nixl_agent_config, native_config as _native_config, nixl_thread_sync_t, text_of as _text_of
from ._handles import nixl_prepped_dlist_handle, nixl_xfer_handle
from .logging import get_logger

logger = get_logger("_api")
nixl_backend_handle = int
_SUCCESS = nixlBind.NIXL_SUCCESS  # the one object that the native calls answer with


def __getattr__(name):
    if name == "np":  # imported when it is first asked for: it takes longer than all of nixl
        import numpy

        return numpy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["DEFAULT_COMM_PORT", "logger", "nixlBind", "nixl_agent", "nixl_agent_config", "nixl_backend_handle",
           "nixl_prepped_dlist_handle", "nixl_thread_sync_t", "nixl_xfer_handle", "pickle", "plugin_report"]


def plugin_report() -> dict[str, dict]:
    """{backend: {"available", "reason", "mem_types", "remote", "local", "notif", "params"}} for every known backend."""
    return _native.plugin_report()


def _name(agent: str | bytes) -> str:
    return agent.decode(errors="surrogateescape") if isinstance(agent, bytes) else agent


def _canonical(backend: str) -> str:
    if not isinstance(backend, str):
        raise TypeError(f"a backend's name is {backend!r}; text such as 'UCX' is needed")
    return _native.canonical_backend(backend)


def _no_handle(seen) -> TypeError:
    return TypeError(f"a handle that this package returned is needed, not {seen!r}")


def _number(handle: nixl_prepped_dlist_handle | nixl_xfer_handle) -> int:
    try:
        return handle._handle
    except AttributeError:
        raise _no_handle(handle) from None


def _bytes(message: str | bytes) -> bytes:
    if isinstance(message, str):
        return message.encode()
    if isinstance(message, (bytes, bytearray, memoryview)):
        return bytes(message)
    raise TypeError(f"a message is {message!r}; str or bytes are needed")


class _Backends(dict):
    """{name: number}, answering to every accepted spelling of a name."""

    def __missing__(self, name):
        canonical = _native.canonical_backend(name) if isinstance(name, str) else name
        if canonical != name and dict.__contains__(self, canonical):
            return self[canonical]
        raise KeyError(f"backend {name!r} was not created by this agent; created: {', '.join(self) or 'none'}")

    def __contains__(self, name):
        return dict.__contains__(self, name) or (isinstance(name, str) and dict.__contains__(self, _native.canonical_backend(name)))

    def get(self, name, default=None):
        return self[name] if name in self else default


class nixl_agent:
    """One agent: registers memory, exchanges metadata and moves data.

    Every method may be called from any thread. Agent names may be str or bytes. Native failures raise the nixl*Error classes; an
    unknown operation or memory type, or a backend that was not created, raises KeyError.
    """

    def __init__(self, agent_name: str | bytes, nixl_conf: nixl_agent_config | None = None, instantiate_all: bool = False) -> None:
        agent_name = agent_name.decode() if isinstance(agent_name, bytes) else agent_name
        if not agent_name:
            raise ValueError("the agent's name is empty")
        if nixl_conf is not None and instantiate_all:
            instantiate_all = False
            logger.warning("instantiate_all is ignored, because nixl_conf is given")
        conf = nixl_agent_config() if nixl_conf is None else nixl_conf
        if not hasattr(conf, "backends"):
            raise TypeError(f"nixl_conf is a {type(conf).__name__}; a nixl_agent_config is needed")
        self.name = agent_name
        self.notifs = {}
        self._notifs_lock = _threading.Lock()
        self.backends = _Backends()
        self.backend_mems, self.backend_options = {}, {}
        self.nixl_mems = dict(_descs.MEMS)
        self.nixl_ops = _descs.Names("operation", {"WRITE": nixlBind.NIXL_WRITE, "READ": nixlBind.NIXL_READ})
        self._leaked_xfer_handles = []
        self._skipped = {}  # backend: why it could not be created
        self._event_fd = None
        self._num_threads = getattr(conf, "num_threads", 0)
        self._backend_params = {_canonical(name): params
                                for name, params in (getattr(conf, "backend_params", None) or {}).items()}
        self.agent = nixlBind.nixlAgent(agent_name, _native_config(conf))
        if instantiate_all:
            self._create_all()
        else:
            self._create_listed(conf.backends)
        if not self.backends and not self.plugin_list:
            raise RuntimeError("No plugins available for NIXL, cannot start transfers!")
        logger.info("Initialized NIXL agent: %s", agent_name)

    # Asked for only when used: looking at every backend loads every vendor's library.
    @_functools.cached_property
    def plugin_list(self) -> list[str]:
        """Names of the backends that could be created when this was first asked."""
        return self.agent.getAvailPlugins()

    @_functools.cached_property
    def _plugin_details(self):
        return {plugin: self.agent.getPluginParams(plugin) for plugin in self.plugin_list}

    @_functools.cached_property
    def plugin_b_options(self) -> dict[str, dict[str, str]]:
        """{backend: {parameter: default}} of plugin_list."""
        return {plugin: options for plugin, (options, _) in self._plugin_details.items()}

    @_functools.cached_property
    def plugin_mem_types(self) -> dict[str, list[str]]:
        """{backend: kinds of memory ("DRAM_SEG", ...)} of plugin_list."""
        return {plugin: kinds for plugin, (_, kinds) in self._plugin_details.items()}

    def _is_available(self, backend):
        try:
            self.agent.getPluginParams(backend)
        except nixlBind.nixlNotFoundError:
            return False
        return True

    def _create_listed(self, names):
        for name in names:
            if self._is_available(_canonical(name)):
                self.create_backend(name)
            else:
                self._skipped[name] = _why_missing(name)
                logger.warning("backend %s is skipped: %s", name, self._skipped[name])

    def _create_all(self):
        for name in self.plugin_list:
            if name == "GDS_MT" and "GDS" in self.backends:
                continue
            try:
                self.create_backend(name)
            except nixlBind.nixlError as error:
                logger.warning("backend %s is skipped: %s", name, error)

    # ---- backends

    def get_plugin_list(self) -> list[str]:
        """Names of the backends that can be created on this machine now."""
        return self.agent.getAvailPlugins()

    def _about_plugin(self, backend, part, empty):
        try:
            return self.agent.getPluginParams(backend)[part]
        except nixlBind.nixlNotFoundError:
            logger.warning("plugin %s is not available: %s", backend, _why_missing(backend))
            return empty

    def get_plugin_mem_types(self, backend: str) -> list[str]:
        """Kinds of memory ("DRAM_SEG", ...) that the backend takes on this machine; [] with a warning when it is not available."""
        return self._about_plugin(backend, 1, [])

    def get_plugin_params(self, backend: str) -> dict[str, str]:
        """{parameter: default} for create_backend; {} with a warning when the backend is not available."""
        return self._about_plugin(backend, 0, {})

    def _about_backend(self, backend, part, empty):
        if backend in self.backends:
            return self.agent.getBackendParams(self.backends[backend])[part]
        logger.warning("backend %s was not created by agent %s", backend, self.name)
        return empty

    def get_backend_mem_types(self, backend: str) -> list[str]:
        """Kinds of memory of a backend of this agent; [] with a warning when it was not created."""
        return self._about_backend(backend, 1, [])

    def get_backend_params(self, backend: str) -> dict[str, str]:
        """{parameter: value} as the backend was created; {} with a warning when it was not."""
        return self._about_backend(backend, 0, {})

    def get_plugin_report(self) -> dict[str, dict]:
        """See :func:`plugin_report`."""
        return plugin_report()

    def create_backend(self, backend: str, initParams: dict = {}) -> None:
        """Creates a backend. `initParams` win over the configuration's backend_params, and these over num_threads."""
        canonical = _canonical(backend)
        if not isinstance(initParams, dict):
            raise TypeError(f"initParams is {initParams!r}; a dict {{parameter: value}} is needed")
        params = {}
        if self._num_threads:
            setting = _native.plugin_details().get(canonical, ("", ""))[1]
            if setting:
                params[setting] = str(self._num_threads)
        params.update({str(key): _text_of(value) for key, value in self._backend_params.get(canonical, {}).items()})
        params.update({str(key): _text_of(value) for key, value in initParams.items()})
        number = self.agent.createBackend(canonical, params)
        self.backends[canonical] = number
        self.backend_options[canonical], self.backend_mems[canonical] = self.agent.getBackendParams(number)
        logger.info("Backend %s was instantiated", canonical)

    def _numbers(self, backends):
        if isinstance(backends, str):
            raise TypeError(f"backends is {backends!r}; a list of names is needed, such as [{backends!r}]")
        return [self.backends[name] for name in backends] if backends else []

    # ---- descriptors

    def get_xfer_descs(self, descs, mem_type: str | None = None, is_sorted: bool = False) -> nixlBind.nixlXferDList | None:
        """nixlXferDList, or None with an error line. See the table of accepted forms in nixl._descs."""
        return _descs.convert(_descs.XFER, descs, mem_type)

    def get_reg_descs(self, descs, mem_type: str | None = None, is_sorted: bool = False) -> nixlBind.nixlRegDList | None:
        """nixlRegDList, or None with an error line; tuples may carry a fourth entry, text or bytes."""
        return _descs.convert(_descs.REG, descs, mem_type)

    def get_remote_descs(self, descs, mem_type: str | None = None) -> nixlBind.nixlRemoteDList | None:
        """nixlRemoteDList of tuples (addr, len, dev, agent name), or None with an error line."""
        return _descs.convert_remote(descs, mem_type)

    def get_serialized_descs(self, descs) -> bytes:
        """Bytes of a descriptor list, or of None or plain builtins."""
        return descs.pack() if hasattr(descs, "pack") else pickle.dumps(descs)

    def deserialize_descs(self, serialized_descs: bytes):
        """What get_serialized_descs was given. Bytes of a peer are safe to read: they make lists and plain builtins only."""
        return _descs.unpack(serialized_descs)

    # ---- memory

    def _reg_list(self, descs, mem_type):
        regs = _descs.convert(_descs.REG, descs, mem_type)
        if regs is None:
            raise TypeError(f"no registration list can be made from {type(descs).__name__} with mem_type={mem_type!r}")
        return regs

    def register_memory(self, reg_list, mem_type: str | None = None, backends: list[str] = [],
                        is_sorted: bool = False) -> nixlBind.nixlRegDList:
        """Registers with `backends`, or with every created backend that supports the kind. Returns the nixlRegDList."""
        numbers = self._numbers(backends)
        regs = self._reg_list(reg_list, mem_type)
        self._with_reasons(self.agent.registerMem, regs, numbers)
        return regs

    def _with_reasons(self, call, *arguments):
        """Calls; what is not found for want of a backend is told together with why backends were skipped."""
        try:
            return call(*arguments)
        except nixlBind.nixlNotFoundError as error:
            if not self._skipped or "backend" not in error.reason:
                raise
            skipped = "; ".join(f"{name} was skipped: {reason}" for name, reason in self._skipped.items())
            raise nixlBind.nixlNotFoundError(f"{error.reason}; {skipped}") from None

    def deregister_memory(self, dereg_list, backends: list[str] = []) -> None:
        """Takes what register_memory took or returned; what a running transfer uses is given back when that ends.
        nixlNotFoundError, and nothing is done, unless every row is registered as given."""
        numbers = self._numbers(backends)
        self.agent.deregisterMem(self._reg_list(dereg_list, None), numbers)

    def query_memory(self, reg_list, backend: str, mem_type: str | None = None) -> list[dict[str, str] | None]:
        """[dict or None] for each descriptor: what the backend knows of the file or object, None when it is absent."""
        if backend not in self.backends:
            raise ValueError(f"backend {backend!r} was not created by agent {self.name}; created: "
                             f"{', '.join(self.backends) or 'none'}")
        if isinstance(reg_list, (list, tuple)) and not reg_list:
            return []
        return self.agent.queryMem(self._reg_list(reg_list, mem_type), self.backends[backend])

    # ---- transfers

    def make_connection(self, remote_agent: str | bytes, backends: list[str] = []) -> None:
        """Wires up, so that the first transfer pays nothing for it. Waits at most ten seconds."""
        self.agent.makeConnection(remote_agent, self._numbers(backends))

    def prep_xfer_dlist(self, agent_name: str | bytes, xfer_list, mem_type: str | None = None, backends: list[str] = [],
                        is_sorted: bool = False) -> nixl_prepped_dlist_handle:
        """Prepares one side. "NIXL_INIT_AGENT" or "": local; the own name: loopback target; else a peer's memory."""
        if _descs._is_array(xfer_list) and xfer_list.ndim == 2 and xfer_list.shape[1] == 5 and mem_type is None:
            raise ValueError("a table of strided runs needs mem_type")
        numbers = self._numbers(backends)
        descs = self._xfer_list(xfer_list, mem_type)
        agent_name = _name(agent_name)
        if agent_name in ("NIXL_INIT_AGENT", nixlBind.NIXL_INIT_AGENT):
            number = self._with_reasons(self.agent.prepXferDlist, descs, numbers)
        else:
            number = self._with_reasons(self.agent.prepXferDlist, agent_name, descs, numbers)
        return nixl_prepped_dlist_handle(self.agent, number)

    def _xfer_list(self, descs, mem_type=None):
        if isinstance(descs, nixlBind.nixlRegDList):
            return descs.trim()
        listed = _descs.convert(_descs.XFER, descs, mem_type)
        if listed is None:
            raise TypeError(f"no transfer list can be made from {type(descs).__name__} with mem_type={mem_type!r}")
        return listed

    def make_prepped_xfer(self, operation: str, local_xfer_side: nixl_prepped_dlist_handle, local_indices,
                          remote_xfer_side: nixl_prepped_dlist_handle, remote_indices, notif_msg: str | bytes = b"",
                          backends: list[str] = [], skip_desc_merge: bool = False) -> nixl_xfer_handle:
        """A transfer over chosen blocks of two prepared sides; indices are lists of int or one-dimensional integer arrays."""
        op = self.nixl_ops[operation]
        numbers = self._numbers(backends)
        number = self.agent.makeXferReq(op, _number(local_xfer_side), local_indices, _number(remote_xfer_side), remote_indices,
                                        notif_msg, numbers, bool(skip_desc_merge))
        return nixl_xfer_handle(self.agent, number)

    def initialize_xfer(self, operation: str, local_descs, remote_descs, remote_agent: str | bytes, notif_msg: str | bytes = b"",
                        backends: list[str] = []) -> nixl_xfer_handle:
        """A transfer of row k with row k; "WRITE" copies local to remote, "READ" remote to local. Registration lists and
        tensors are accepted too. `notif_msg` reaches the peer after all data of each post; empty: none."""
        op = self.nixl_ops[operation]
        numbers = self._numbers(backends)
        if local_descs is None or remote_descs is None:
            raise TypeError("descriptor lists are needed, not None")
        number = self._with_reasons(self.agent.createXferReq, op, self._xfer_list(local_descs), self._xfer_list(remote_descs),
                                    remote_agent, notif_msg, numbers)
        return nixl_xfer_handle(self.agent, number)

    def transfer(self, handle: nixl_xfer_handle, notif_msg: str | bytes = b"") -> str:
        """Starts or restarts: "DONE" or "PROC". An empty notification keeps the one given before."""
        try:
            number = handle._handle
        except AttributeError:
            raise _no_handle(handle) from None
        return "DONE" if self.agent.postXferReq(number, notif_msg) is _SUCCESS else "PROC"

    def check_xfer_state(self, handle: nixl_xfer_handle) -> str:
        """"DONE" or "PROC"; a transfer that failed raises its error, as often as it is asked."""
        try:
            number = handle._handle
        except AttributeError:
            raise _no_handle(handle) from None
        return "DONE" if self.agent.getXferStatus(number) is _SUCCESS else "PROC"

    def cancel_xfer(self, handle: nixl_xfer_handle) -> None:
        """Ends a running transfer; check_xfer_state raises nixlCancelledError afterwards."""
        self.agent.cancelXferReq(_number(handle))

    def estimate_xfer_cost(self, req_handle: nixl_xfer_handle) -> tuple[int, int, str]:
        """(duration in us, error margin in us, method)."""
        duration, margin, method = self.agent.estimateXferCost(_number(req_handle))
        return duration, margin, "ANALYTICAL_BACKEND" if method == nixlBind.NIXL_COST_ANALYTICAL_BACKEND else "UNKNOWN"

    def get_xfer_telemetry(self, handle: nixl_xfer_handle) -> nixlBind.nixlXferTelemetry:
        """startTime, postDuration, xferDuration (us), totalBytes, descCount, backendName; needs capture_telemetry."""
        return self.agent.getXferTelemetry(_number(handle))

    def query_xfer_backend(self, handle: nixl_xfer_handle) -> str:
        """Name of the backend that was asked to do the transfer."""
        number = self.agent.queryXferBackend(_number(handle))
        return next(name for name, held in self.backends.items() if held == number)

    def query_xfer_path(self, handle: nixl_xfer_handle) -> str:
        """Text naming the transport used, e.g. "shm", "tcp", "cuda_ipc"."""
        return self.agent.queryXferPath(_number(handle))

    def release_xfer_handle(self, handle: nixl_xfer_handle) -> None:
        """Cancels the transfer if it runs and gives everything back. Doing it again does nothing."""
        _number(handle)
        handle.release()

    def release_dlist_handle(self, handle: nixl_prepped_dlist_handle) -> None:
        """Gives the prepared side back; transfers made from it go on. Doing it again does nothing."""
        _number(handle)
        handle.release()

    def prep_mem_view(self, dlist, *, backends: list[str] | None = None) -> int:
        """A table of memory for kernels that start transfers themselves; nixlNotSupportedError: no backend offers that."""
        return self.agent.prepMemView(dlist, self._numbers(backends or []))

    def release_mem_view(self, mvh: int) -> None:
        """Gives a table of prep_mem_view back."""
        self.agent.releaseMemView(mvh)

    def event_fd(self) -> int:
        """A descriptor that polls readable when a transfer ended or a notification arrived; read 8 bytes to clear it."""
        if self._event_fd is None:
            self._event_fd = self.agent.eventFd()
        return self._event_fd

    # ---- notifications

    def get_new_notifs(self, backends: list[str] = []) -> dict[str, list[bytes]]:
        """{sender: [bytes]} of what arrived since the last call."""
        return self.agent.getNotifs({}, self._numbers(backends))

    def update_notifs(self, backends: list[str] = []) -> dict[str, list[bytes]]:
        """Adds what arrived to ``notifs`` and returns that: {sender: [bytes]}, kept until taken out."""
        self.notifs = self.agent.getNotifs(self.notifs, self._numbers(backends))
        return self.notifs

    def check_remote_xfer_done(self, remote_agent_name: str | bytes, lookup_tag: str | bytes, backends: list[str] = [],
                               tag_is_prefix: bool = True) -> bool:
        """True, once for each, when a message of that sender starts with (or contains) the tag."""
        sender, tag = _name(remote_agent_name), _bytes(lookup_tag)
        self.update_notifs(backends)
        with self._notifs_lock:  # another thread may take messages of the same sender
            messages = self.notifs.get(sender, [])
            for place, message in enumerate(messages):
                if message.startswith(tag) if tag_is_prefix else tag in message:
                    del messages[place]
                    return True
        return False

    def send_notif(self, remote_agent_name: str | bytes, notif_msg: str | bytes, backend: str | None = None) -> None:
        """Sends a message by itself; messages of one sender arrive in order, each once. Returns at once."""
        self.agent.genNotif(remote_agent_name, notif_msg, [] if backend is None else self._numbers([backend]))

    # ---- metadata

    def get_agent_metadata(self) -> bytes:
        """Everything a peer needs: how to reach this agent, and all memory registered now. For add_remote_agent of the peer."""
        return self.agent.getLocalMD()

    def get_partial_agent_metadata(self, descs, inc_conn_info: bool = False, backends: list[str] = []) -> bytes:
        """As get_agent_metadata, with the listed memory only; `inc_conn_info` adds how to reach this agent."""
        return self.agent.getLocalPartialMD(self._partial_list(descs), bool(inc_conn_info), self._numbers(backends))

    def _partial_list(self, descs):
        if descs is None or (isinstance(descs, (list, tuple)) and not descs):
            return nixlBind.nixlRegDList(nixlBind.DRAM_SEG)
        return self._reg_list(descs, None)

    def add_remote_agent(self, metadata: bytes) -> bytes:
        """Makes a peer known from its metadata, or adds to what is known of it; its name as bytes. What full metadata does not hold any
        more is forgotten; metadata older than what was loaded of the same life of the peer changes nothing."""
        return self.agent.loadRemoteMD(metadata)

    def remove_remote_agent(self, agent: str | bytes) -> None:
        """Forgets a peer: its transfers end, its handles fail from now on. It may be added again."""
        self.agent.invalidateRemoteMD(agent)

    def check_remote_metadata(self, agent: str | bytes, descs=None) -> bool:
        """Is the agent known and, with `descs`, is all of that memory of it known?"""
        wanted = nixlBind.nixlXferDList(nixlBind.DRAM_SEG) if descs is None else self._xfer_list(descs)
        return self.agent.checkRemoteMD(agent, wanted) == nixlBind.NIXL_SUCCESS

    def send_local_metadata(self, ip_addr: str = "", port: int = DEFAULT_COMM_PORT) -> None:
        """Sends our metadata to a listener, or to the store when no address is given. Returns at once."""
        self.agent.sendLocalMD(ip_addr, port)

    def send_partial_agent_metadata(self, descs, inc_conn_info: bool = False, backends: list[str] = [], ip_addr: str = "",
                                    port: int = DEFAULT_COMM_PORT, label: str = "") -> None:
        """As send_local_metadata, with partial metadata; in the store it goes under `label`."""
        self.agent.sendLocalPartialMD(self._partial_list(descs), bool(inc_conn_info), self._numbers(backends), ip_addr, port, label)

    def fetch_remote_metadata(self, remote_agent: str | bytes, ip_addr: str = "", port: int = DEFAULT_COMM_PORT,
                              label: str = "") -> None:
        """Asks a listener or the store for a peer's metadata. Returns at once; check_remote_metadata tells when it is there."""
        self.agent.fetchRemoteMD(remote_agent, ip_addr, port, label)

    def invalidate_local_metadata(self, ip_addr: str = "", port: int = DEFAULT_COMM_PORT) -> None:
        """Tells a listener to forget this agent, or withdraws what was published when no address is given. Returns at once."""
        self.agent.invalidateLocalMD(ip_addr, port)

    def get_listen_port(self) -> int:
        """The port listened on, 0 when there is no listener."""
        return self.agent.getListenPort()


def _why_missing(name: str) -> str:
    about = plugin_report().get(_native.canonical_backend(name))
    return about["reason"] if about else f"there is no backend of this name; known: {' '.join(plugin_report())}"
