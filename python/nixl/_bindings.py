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


for _kind in (nixl_cost_t, nixl_thread_sync_t, nixl_status_t):
    globals().update(_kind.__members__)
del _kind

_native.set_classes(nixl_status_t, _from_status)
