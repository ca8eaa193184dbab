"""On which CUDA stream work goes, and how operations keep their order."""
from typing import Any, Optional

from .errors import require
from .tensors import torch
from .utils import EventHandle, EventOverlap

_LEGACY = 1  # CUDA's name for the default stream where 0 would mean none


class Streams:
    """The streams of one buffer, as numbers (cudaStream_t). On the CPU all are 0."""

    def __init__(self, device: str, device_id: int) -> None:
        self._cuda = device == "cuda"
        self._device_id = device_id
        self._comm: Optional[Any] = None
        self._comm_ahead = False  # operations were put on the comm stream that the current one has not waited for

    def comm(self) -> Any:
        """The high-priority torch.cuda.Stream of asynchronous operations, always the same."""
        require(self._cuda, "get_comm_stream() needs a buffer on CUDA; this one works on the CPU")
        if self._comm is None:
            self._comm = torch().cuda.Stream(device=self._device_id, priority=-1)
        return self._comm

    def current(self) -> int:
        """The caller's stream."""
        return torch().cuda.current_stream().cuda_stream if self._cuda else 0

    def of_change(self) -> int:
        """Like current, but never 0, which asks for a change at once, behind no stream: work that the caller has queued in the
        default stream, replays of graphs for one, comes first."""
        return self.current() or (_LEGACY if self._cuda else 0)

    def of_operation(self, async_finish: bool) -> int:
        """Asynchronous operations run on the comm stream after the current one, all others on the current stream, which
        first waits for what is still running on the comm stream: operations keep their order."""
        if not self._cuda:
            return 0
        current = torch().cuda.current_stream()
        if not async_finish:
            # Streams inside and outside a graph capture cannot wait for each other.
            if self._comm_ahead and _capturing(current) == _capturing(self._comm):
                current.wait_stream(self._comm)
                self._comm_ahead = False
            return current.cuda_stream
        comm = self.comm()
        comm.wait_stream(current)
        return comm.cuda_stream

    def event_of_asynchronous(self, keep: tuple) -> EventOverlap:
        """The end of the asynchronous operation just launched; `keep` lives as long as the event."""
        if not self._cuda:
            return EventOverlap(EventHandle(), keep)
        with torch().cuda.stream(self.comm()):
            event = EventHandle()
        self._comm_ahead = True
        return EventOverlap(event, keep)


def _capturing(stream: Any) -> bool:
    with torch().cuda.stream(stream):
        return torch().cuda.is_current_stream_capturing()
