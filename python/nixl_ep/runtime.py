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
        """Whether memory was allocated."""
        return self._buffer.group_size > 0

    def get_num_rdma_ranks(self) -> int:
        """Nodes of eight ranks that hold the capacity, 1 at least."""
        return max(-(-self._buffer.group_size // 8), 1)

    def get_rdma_rank(self) -> int:
        """Which of them this rank is on."""
        return self._buffer.rank // 8

    def get_root_rdma_rank(self, global_: bool) -> int:
        """Place of this rank on its node if `global_`, else 0."""
        return self._buffer.rank % 8 if global_ else 0

    def get_local_device_id(self) -> int:
        """CUDA device index; 0 on the CPU."""
        return self._buffer._device_id

    def get_local_ipc_handle(self) -> bytes:
        """8 bytes that no other life of a rank has; nothing can be opened with them."""
        return self.native.incarnation().to_bytes(8, "little")

    def get_local_metadata(self) -> bytes:
        """"rank:incarnation" as bytes."""
        return f"{self._buffer.rank}:{self.native.incarnation()}".encode()
