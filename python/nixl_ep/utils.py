"""Events: points in a stream that others can wait for."""
import sys
from typing import Any, Optional

from .errors import require


def _cuda_in_use() -> bool:
    """Whether torch is loaded and has a CUDA context in this process; on the CPU path there is nothing to record."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


class EventHandle:
    """A point recorded in the current CUDA stream at construction. Copyable. On the CPU path it has always passed."""

    def __init__(self) -> None:
        self._event = None
        if _cuda_in_use():
            torch = sys.modules["torch"]
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream())

    def current_stream_wait(self) -> None:
        """Makes the current stream wait for the recorded point; the host does not wait."""
        if self._event is not None:
            sys.modules["torch"].cuda.current_stream().wait_event(self._event)

    def __copy__(self) -> "EventHandle":
        other = EventHandle.__new__(EventHandle)
        other._event = self._event
        return other


class EventOverlap:
    """An event and the tensors that must live until it has passed. As a context manager, leaving it waits.

    Arguments:
        event: anything with ``current_stream_wait()``, or None.
        extra_tensors: kept alive as long as this object.
    """

    def __init__(self, event: Optional[Any] = None, extra_tensors: Optional[tuple] = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Makes the current stream wait for the event; the host does not wait."""
        require(self.event is not None, "this EventOverlap holds no event to wait for")
        self.event.current_stream_wait()

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.event is not None:
            self.event.current_stream_wait()
