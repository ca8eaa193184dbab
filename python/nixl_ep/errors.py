"""The one exception class of the package, and the checks that raise it."""
import operator
from typing import Any, Callable


class NixlEpError(RuntimeError, AssertionError):
    """An operation or argument was refused, or membership failed; the text names the condition and the values."""


def require(condition: bool, message: str) -> None:
    """Raises NixlEpError(message) unless the condition holds."""
    if not condition:
        raise NixlEpError(message)


def integer(name: str, value: Any, bits: int = 32) -> int:
    """The value as an int; TypeError when it is none, NixlEpError when it does not fit a signed number of `bits` bits."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; an integer is needed") from None
    require(-(1 << bits - 1) <= number < 1 << bits - 1, f"{name} is {number}; it does not fit {bits} bits")
    return number


def native_call(call: Callable, *arguments: Any) -> Any:
    """Calls into the library; its exceptions become NixlEpError."""
    try:
        return call(*arguments)
    except NixlEpError:
        raise
    except RuntimeError as error:
        raise NixlEpError(str(error)) from None
