"""Chunk sizes of the high-throughput mode: the Config class and the recommended values."""
from .errors import NixlEpError, integer, require

_ALIGN = 128
_PEERS_PER_NODE = 8
_TOPK_LIMIT = 128  # the hints leave room for this many ids and weights a token


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


class Config:
    """Number of SMs and chunk sizes, in tokens, of the high-throughput kernels.

    Raises:
        NixlEpError: num_sms < 0, a size <= 0, or a send chunk that does not fit its receive buffer (for RDMA: twice).
    """

    def __init__(self, num_sms: int = 20, num_max_nvl_chunked_send_tokens: int = 6,
                 num_max_nvl_chunked_recv_tokens: int = 256, num_max_rdma_chunked_send_tokens: int = 6,
                 num_max_rdma_chunked_recv_tokens: int = 256) -> None:
        num_sms = integer("num_sms", num_sms)
        nvl_send = integer("num_max_nvl_chunked_send_tokens", num_max_nvl_chunked_send_tokens)
        nvl_recv = integer("num_max_nvl_chunked_recv_tokens", num_max_nvl_chunked_recv_tokens)
        rdma_send = integer("num_max_rdma_chunked_send_tokens", num_max_rdma_chunked_send_tokens)
        rdma_recv = integer("num_max_rdma_chunked_recv_tokens", num_max_rdma_chunked_recv_tokens)
        require(num_sms >= 0, f"num_sms is {num_sms}; 0 or more is allowed")
        require(nvl_send > 0 and nvl_recv > 0, f"NVLink chunks are {nvl_send} and {nvl_recv}; both must be positive")
        require(nvl_send < nvl_recv, f"the NVLink send chunk {nvl_send} must be below the receive buffer {nvl_recv}")
        require(rdma_send > 0 and rdma_recv > 0, f"RDMA chunks are {rdma_send} and {rdma_recv}; both must be positive")
        rounded = _round_up(rdma_recv, rdma_send)
        require(rdma_send < rounded and rdma_send <= rounded // 2,
                f"the RDMA send chunk {rdma_send} must be at most half of the receive buffer {rounded}")
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = nvl_send
        self.num_max_nvl_chunked_recv_tokens = nvl_recv
        self.num_max_rdma_chunked_send_tokens = rdma_send
        self.num_max_rdma_chunked_recv_tokens = rdma_recv
        self._rdma_recv_rounded = rounded

    def __repr__(self) -> str:
        return "Config(" + ", ".join(f"{name}={value}" for name, value in vars(self).items()
                                    if not name.startswith("_")) + ")"

    @staticmethod
    def _token_bytes(hidden_bytes: int) -> int:
        """Row, source record, prefix words, and the ids, weights and scales of a token."""
        return hidden_bytes + 8 + _TOPK_LIMIT * 8 + _TOPK_LIMIT * 4 + _TOPK_LIMIT * 4

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of NVLink buffer for rows of `hidden_bytes` bytes, a multiple of 128."""
        channels, peers, nodes = self.num_sms // 2, min(num_ranks, _PEERS_PER_NODE), max(num_ranks // _PEERS_PER_NODE, 1)
        size = channels * peers * (2 * nodes + 3) * 4
        size += channels * peers * self.num_max_nvl_chunked_recv_tokens * self._token_bytes(hidden_bytes)
        return _round_up(size, _ALIGN)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes of RDMA buffer for rows of `hidden_bytes` bytes; 0 when all ranks are on one node."""
        if num_ranks <= _PEERS_PER_NODE:
            return 0
        channels, nodes = self.num_sms // 2, num_ranks // _PEERS_PER_NODE
        size = channels * nodes * 18 * 2 * 4
        size += channels * nodes * self._rdma_recv_rounded * 2 * (self._token_bytes(hidden_bytes) + 16)
        return _round_up(size, _ALIGN)


# ranks -> NVLink send, NVLink receive, RDMA send, RDMA receive chunks.
DISPATCH = {
    2: (24, 256, 6, 128), 4: (6, 256, 6, 128), 8: (6, 256, 6, 128), 16: (36, 288, 20, 128), 24: (8, 288, 32, 128),
    32: (32, 288, 32, 128), 64: (20, 288, 28, 128), 128: (20, 560, 32, 128), 144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
COMBINE = {
    2: (10, 256, 6, 128), 4: (9, 256, 6, 128), 8: (4, 256, 6, 128), 16: (4, 288, 12, 128), 24: (1, 288, 8, 128),
    32: (1, 288, 8, 128), 64: (1, 288, 20, 128), 128: (1, 560, 12, 128), 144: (2, 720, 8, 128), 160: (2, 720, 8, 128),
}


def recommended(table: dict, num_ranks: int, num_sms: int) -> Config:
    """The entry of `num_ranks`, or of the nearest lower count."""
    num_ranks = integer("num_ranks", num_ranks)
    known = max((ranks for ranks in table if ranks <= num_ranks), default=None)
    if known is None:
        raise NixlEpError(f"no recommended configuration for {num_ranks} ranks; the smallest count is {min(table)}")
    return Config(num_sms, *table[known])
