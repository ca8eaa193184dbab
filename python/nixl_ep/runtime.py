"""What programs ask the compiled object behind a buffer."""
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .buffer import Buffer


class Runtime:
    """Buffer.runtime: the native object, and the queries of the compiled module under their names."""

    def __init__(self, native: Any, buffer: "Buffer") -> None:
        self.native = native
        self._buffer = weakref.proxy(buffer)  # no cycle: the memory goes with the last reference

    def is_available(self) -> bool:
        return self._buffer.group_size > 0

    def get_num_rdma_ranks(self) -> int:
        return max(self._buffer.group_size // 8, 1)

    def get_rdma_rank(self) -> int:
        return self._buffer.rank // 8

    def get_root_rdma_rank(self, global_: bool) -> int:
        return self._buffer.rank % 8 if global_ else 0

    def get_local_device_id(self) -> int:
        return self._buffer._device_id

    def get_local_ipc_handle(self) -> bytes:
        return self.native.incarnation().to_bytes(8, "little")

    def get_local_metadata(self) -> bytes:
        return f"{self._buffer.rank}:{self.native.incarnation()}".encode()
