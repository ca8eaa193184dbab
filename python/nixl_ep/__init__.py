"""Expert-parallel dispatch and combine over a group of ranks that grows, shrinks and survives a killed member.

Importing this package loads neither torch nor a CUDA driver and starts no thread. Shapes, dtypes and the life of a buffer:
:class:`nixl_ep.Buffer`.
"""
from ._native import cuda_unavailable_reason
from .buffer import Buffer, Fault
from .config import Config
from .errors import NixlEpError
from .utils import EventHandle, EventOverlap

__all__ = [
    "Buffer", "Config", "EventHandle", "EventOverlap", "Fault", "NixlEpError", "cuda_unavailable_reason", "topk_idx_t",
]


def __getattr__(name):
    if name == "topk_idx_t":
        import torch

        return torch.int32
    raise AttributeError(f"module 'nixl_ep' has no attribute '{name}'")
