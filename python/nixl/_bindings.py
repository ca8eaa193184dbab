"""The low-level interface: native classes, enums and exceptions. Handles are integers; statuses come back, errors are raised."""
import enum as _enum

from ._errors import (nixlBackendError, nixlCancelledError, nixlError, nixlInvalidParamError, nixlMismatchError,
                      nixlNotAllowedError, nixlNotFoundError, nixlNotPostedError, nixlNotSupportedError,
                      nixlNoTelemetryError, nixlRemoteDisconnectError, nixlRepostActiveError, nixlUnknownError)
from ._errors import from_status as _from_status
from . import _native
from ._native import (BLK_SEG, DRAM_SEG, FILE_SEG, NIXL_READ, NIXL_WRITE, OBJ_SEG, VRAM_SEG, nixl_mem_t, nixl_xfer_op_t,
                      nixlAgent, nixlAgentConfig, nixlRegDList, nixlRemoteDList, nixlXferDList, nixlXferTelemetry)

NIXL_INIT_AGENT = ""
DEFAULT_COMM_PORT = 8888
HAVE_UCX_GPU_DEVICE_API = False


class nixl_cost_t(_enum.IntEnum):
    NIXL_COST_ANALYTICAL_BACKEND = 0


class nixl_thread_sync_t(_enum.IntEnum):
    NIXL_THREAD_SYNC_NONE = 0
    NIXL_THREAD_SYNC_STRICT = 1
    NIXL_THREAD_SYNC_RW = 2
    NIXL_THREAD_SYNC_DEFAULT = 0


class nixl_status_t(_enum.IntEnum):
    NIXL_IN_PROG = 1
    NIXL_SUCCESS = 0
    NIXL_ERR_NOT_POSTED = -1
    NIXL_ERR_INVALID_PARAM = -2
    NIXL_ERR_BACKEND = -3
    NIXL_ERR_NOT_FOUND = -4
    NIXL_ERR_MISMATCH = -5
    NIXL_ERR_NOT_ALLOWED = -6
    NIXL_ERR_REPOST_ACTIVE = -7
    NIXL_ERR_UNKNOWN = -8
    NIXL_ERR_NOT_SUPPORTED = -9
    NIXL_ERR_REMOTE_DISCONNECT = -10
    NIXL_ERR_CANCELED = -11
    NIXL_ERR_NO_TELEMETRY = -12


nixl_status_t = _native.set_classes(nixl_status_t, _from_status)
NIXL_COST_ANALYTICAL_BACKEND = nixl_cost_t.NIXL_COST_ANALYTICAL_BACKEND
NIXL_THREAD_SYNC_NONE, NIXL_THREAD_SYNC_STRICT, NIXL_THREAD_SYNC_RW = nixl_thread_sync_t
NIXL_THREAD_SYNC_DEFAULT = nixl_thread_sync_t.NIXL_THREAD_SYNC_DEFAULT
(NIXL_IN_PROG, NIXL_SUCCESS, NIXL_ERR_NOT_POSTED, NIXL_ERR_INVALID_PARAM, NIXL_ERR_BACKEND, NIXL_ERR_NOT_FOUND, NIXL_ERR_MISMATCH,
 NIXL_ERR_NOT_ALLOWED, NIXL_ERR_REPOST_ACTIVE, NIXL_ERR_UNKNOWN, NIXL_ERR_NOT_SUPPORTED, NIXL_ERR_REMOTE_DISCONNECT,
 NIXL_ERR_CANCELED, NIXL_ERR_NO_TELEMETRY) = nixl_status_t
