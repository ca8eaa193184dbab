"""Checks of the caller's tensors, and allocation of the results."""
import sys
from typing import Any, List, Optional, Sequence, Tuple, Union

from . import _native
from .errors import NixlEpError, integer, require


def torch():
    """torch, imported at the first operation on tensors."""
    module = sys.modules.get("torch")
    if module is None:
        import torch as module
    return module


Ranks = Union[int, Sequence[int], Any]  # a rank, several, or a tensor of them


def rank_list(name: str, ranks: Ranks) -> List[int]:
    """The ranks as a list; TypeError naming the argument when they are none."""
    if hasattr(ranks, "tolist"):
        ranks = ranks.tolist()
    try:
        return [integer(name, rank) for rank in ranks] if hasattr(ranks, "__iter__") else [integer(name, ranks)]
    except TypeError:
        raise TypeError(f"{name} is {ranks!r}; a rank or a list of ranks is needed, each an integer") from None


def extents(name: str, shape: Sequence[int]) -> Tuple[int, ...]:
    """The shape as a tuple; NixlEpError, TypeError naming the argument when it is none."""
    require(hasattr(shape, "__iter__"), f"{name} is {shape!r}; a sequence of extents is needed, such as [{shape!r}]")
    sizes = tuple(integer(f"an extent of {name}", extent, 64) for extent in shape)
    require(min(sizes, default=0) >= 0, f"{name} is {list(sizes)}; extents from 0 are allowed")
    return sizes


def address(tensor: Optional[Any]) -> int:
    """Of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def check(name: str, tensor: Any, dtypes: Sequence[Any], shape: Sequence[Optional[int]], device: str) -> None:
    """Raises unless `tensor` is a contiguous tensor of one of the dtypes and of the shape (None: any size)."""
    if not (isinstance(tensor, torch().Tensor) and tensor.dtype in dtypes and _fits(tensor.shape, shape)
            and tensor.is_contiguous() and tensor.device.type == device):
        _refuse(name, tensor, dtypes, shape, device)


def _fits(seen: Sequence[int], wanted: Sequence[Optional[int]]) -> bool:
    if len(seen) != len(wanted):
        return False
    for have, want in zip(seen, wanted):
        if want is not None and want != have:
            return False
    return True


def _refuse(name: str, tensor: Any, dtypes: Sequence[Any], shape: Sequence[Optional[int]], device: str) -> None:
    if not isinstance(tensor, torch().Tensor):
        raise NixlEpError(f"{name} is {'None' if tensor is None else 'a ' + type(tensor).__name__}; a torch tensor is needed")
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    require(tensor.dtype in dtypes, f"{name} is {tensor.dtype}; allowed: {', '.join(str(d) for d in dtypes)}")
    require(_fits(tensor.shape, shape), f"{name} has shape {list(tensor.shape)}; {wanted} is needed")
    require(tensor.is_contiguous(), f"{name} has strides {tensor.stride()}; it must be contiguous (call .contiguous())")
    raise NixlEpError(f"{name} is on {tensor.device}; this buffer works on {device} tensors")


class Allocator:
    """Fresh tensors of one device ("cpu", "cuda:0"). On the CPU large blocks are recycled when the tensors in them are gone."""

    RECYCLE_FROM = 1 << 16  # bytes

    def __init__(self, device: str) -> None:
        self.device = device

    def empty(self, shape: Sequence[int], dtype: Any):
        """A contiguous tensor with undefined content."""
        t = torch()
        if self.device != "cpu":
            return t.empty(shape, dtype=dtype, device=self.device)
        count = 1
        for size in shape:
            count *= size
        if count * dtype.itemsize < self.RECYCLE_FROM:
            return t.empty(shape, dtype=dtype, device="cpu")
        block = t.from_dlpack(_native.output_block(count * dtype.itemsize))
        return block.view(dtype).view(shape)
