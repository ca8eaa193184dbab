"""The one exception class of the package."""


class NixlEpError(RuntimeError, AssertionError):
    """An operation or argument was refused, or membership failed; the text names the condition and the values."""


def require(condition: bool, message: str) -> None:
    """Raises NixlEpError(message) unless the condition holds."""
    if not condition:
        raise NixlEpError(message)
