"""The one exception class of the package."""
from typing import Any, Callable


class NixlEpError(RuntimeError, AssertionError):
    """An operation or argument was refused, or membership failed; the text names the condition and the values."""


def require(condition: bool, message: str) -> None:
    """Raises NixlEpError(message) unless the condition holds."""
    if not condition:
        raise NixlEpError(message)


def native_call(call: Callable, *arguments: Any) -> Any:
    """Calls into the library; its exceptions become NixlEpError."""
    try:
        return call(*arguments)
    except NixlEpError:
        raise
    except RuntimeError as error:
        raise NixlEpError(str(error)) from None
