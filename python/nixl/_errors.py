"""Exceptions of nixl, one class for each status that a native call can end with."""
from . import _native


class nixlError(Exception):
    """Base of all nixl errors.

    ``status`` is the status number (negative), ``reason`` the text after its name.
    """

    status = 0
    _name = "NIXL_ERR"

    def __init__(self, reason=""):
        text = str(reason)
        prefix = f"{self._name}: "
        self.reason = text[len(prefix):] if text.startswith(prefix) else "" if text == self._name else text
        super().__init__(f"{self._name}: {self.reason}" if self.reason else self._name)

    def __reduce__(self):
        return type(self), (self.reason,)


def _define(class_name, status, name):
    return type(class_name, (nixlError,), {"status": status, "_name": name, "__module__": "nixl._bindings",
                                           "__doc__": f"Status {status}, {name}."})


nixlNotPostedError = _define("nixlNotPostedError", -1, "NIXL_ERR_NOT_POSTED")
nixlInvalidParamError = _define("nixlInvalidParamError", -2, "NIXL_ERR_INVALID_PARAM")
nixlBackendError = _define("nixlBackendError", -3, "NIXL_ERR_BACKEND")
nixlNotFoundError = _define("nixlNotFoundError", -4, "NIXL_ERR_NOT_FOUND")
nixlMismatchError = _define("nixlMismatchError", -5, "NIXL_ERR_MISMATCH")
nixlNotAllowedError = _define("nixlNotAllowedError", -6, "NIXL_ERR_NOT_ALLOWED")
nixlRepostActiveError = _define("nixlRepostActiveError", -7, "NIXL_ERR_REPOST_ACTIVE")
nixlUnknownError = _define("nixlUnknownError", -8, "NIXL_ERR_UNKNOWN")
nixlNotSupportedError = _define("nixlNotSupportedError", -9, "NIXL_ERR_NOT_SUPPORTED")
nixlRemoteDisconnectError = _define("nixlRemoteDisconnectError", -10, "NIXL_ERR_REMOTE_DISCONNECT")
nixlCancelledError = _define("nixlCancelledError", -11, "NIXL_ERR_CANCELED")
nixlNoTelemetryError = _define("nixlNoTelemetryError", -12, "NIXL_ERR_NO_TELEMETRY")

_BY_STATUS = {kind.status: kind for kind in nixlError.__subclasses__()}


def from_status(status, reason):
    """The exception object for a native status; called by the bindings."""
    kind = _BY_STATUS.get(status)
    return kind(reason) if kind else RuntimeError("BAD_STATUS")


# Imported again after sys.modules was cleaned: native calls raise the classes of the first time, so those stay in force.
globals().update(_native.__dict__.setdefault("error_classes", {name: value for name, value in globals().items()
                                                               if name.startswith("nixl") or name == "from_status"}))
