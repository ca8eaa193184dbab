"""What callers may pass where descriptors are wanted, turned into native lists; and lists back from the bytes of a peer.

Accepted: a native list; a list of tuples or an N x 3 array of (addr, len, dev) with a memory type; an N x 5 array of strided runs;
one tensor or a list of tensors; a list of NumPy buffers. Tensors are recognised without importing torch.
"""
import io
import pickle
import sys

from . import _bindings as nixlBind
from . import _native
from .logging import get_logger

logger = get_logger("_descs")


class Names(dict):
    """{accepted spelling: value}; looking up another one is a KeyError that lists what is known."""

    def __init__(self, what, values):
        super().__init__(values)
        self._what = what

    def __missing__(self, name):
        raise KeyError(f"{self._what} {name!r} is unknown; known: {', '.join(self)}")


MEMS = Names("memory type", {
    "DRAM": nixlBind.DRAM_SEG, "VRAM": nixlBind.VRAM_SEG, "FILE": nixlBind.FILE_SEG, "BLOCK": nixlBind.BLK_SEG,
    "BLK": nixlBind.BLK_SEG, "OBJ": nixlBind.OBJ_SEG, "cpu": nixlBind.DRAM_SEG, "cuda": nixlBind.VRAM_SEG,
})
XFER, REG = nixlBind.nixlXferDList, nixlBind.nixlRegDList
ARITY = {XFER: (3,), REG: (3, 4)}


def _refused(text, *values):
    logger.error(text, *values)
    return None


def _is_array(value):
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_tensor(value):
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return True
    return not _is_array(value) and (hasattr(value, "__cuda_array_interface__") or hasattr(value, "__dlpack__"))


def _region_of_array(array):
    if not array.flags.c_contiguous:
        return _refused("a NumPy array of shape %s is not C-contiguous", array.shape)
    return nixlBind.DRAM_SEG, (array.ctypes.data, array.nbytes, 0)


def _region_of_tensor(tensor):
    """(memory type, (addr, len, dev)) or None with an error line."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        if not tensor.is_contiguous():
            return _refused("a tensor of shape %s is not contiguous", tuple(tensor.shape))
        on_gpu = tensor.device.type == "cuda"
        if not on_gpu and tensor.device.type != "cpu":
            return _refused("a tensor on device %s: only cpu and cuda are known", tensor.device)
        size = tensor.numel() * tensor.element_size()
        kind = nixlBind.VRAM_SEG if on_gpu else nixlBind.DRAM_SEG
        return kind, (tensor.data_ptr(), size, tensor.get_device() if on_gpu else 0)
    import numpy as np

    if hasattr(tensor, "__cuda_array_interface__"):
        about = tensor.__cuda_array_interface__
        itemsize = np.dtype(about["typestr"]).itemsize
        dense, step = [], itemsize
        for extent in reversed(about["shape"]):
            dense.insert(0, step)
            step *= extent
        if about.get("strides") not in (None, tuple(dense)):
            return _refused("a device array of shape %s is not contiguous", about["shape"])
        device = tensor.__dlpack_device__()[1] if hasattr(tensor, "__dlpack_device__") else 0
        return nixlBind.VRAM_SEG, (about["data"][0], step, int(device))
    if not hasattr(tensor, "__dlpack__"):
        return _refused("a list of tensors and arrays holds a %s", type(tensor).__name__)
    return _region_of_array(np.from_dlpack(tensor))


def _from_regions(kind, regions):
    if any(region is None for region in regions):
        return None
    types = {int(mem) for mem, _ in regions}
    if len(types) != 1:
        return _refused("the list mixes tensors in host and device memory; one list holds one kind")
    return kind(regions[0][0], [row for _, row in regions])


def _from_array(kind, array, mem_type):
    if mem_type is None:
        return _refused("an array of descriptors needs mem_type, one of %s", ", ".join(MEMS))
    columns = (3, 5) if kind is XFER else (3,)
    if array.ndim != 2 or array.shape[1] not in columns:
        return _refused("an array of descriptors is N x %s, not of shape %s", " or ".join(map(str, columns)), array.shape)
    mem = MEMS[mem_type]
    return XFER.from_strided(mem, array) if array.shape[1] == 5 else kind(mem, array)


def _from_tuples(kind, rows, mem_type):
    if mem_type is None or len(rows[0]) not in ARITY[kind]:
        return _refused("tuples of descriptors need mem_type (seen: %s) and %s entries (seen: %d)", mem_type,
                        " or ".join(map(str, ARITY[kind])), len(rows[0]))
    return kind(MEMS[mem_type], rows)


def convert(kind, descs, mem_type=None):
    """A native list of class `kind`, or None with an error line; KeyError, ValueError, TypeError as documented."""
    if isinstance(descs, kind):
        return descs
    if isinstance(descs, (XFER, REG, nixlBind.nixlRemoteDList)):
        return _refused("a %s is needed, not a %s", kind.__name__, type(descs).__name__)
    if _is_array(descs):
        return _from_array(kind, descs, mem_type)
    if _is_tensor(descs):
        if mem_type is not None:
            MEMS[mem_type]
        return _from_regions(kind, [_region_of_tensor(descs)])
    if not isinstance(descs, (list, tuple)):
        return _refused("descriptors cannot be made from a %s", type(descs).__name__)
    first = descs[0]
    if isinstance(first, tuple):
        return _from_tuples(kind, descs if isinstance(descs, list) else list(descs), mem_type)
    if mem_type is not None:
        MEMS[mem_type]
    if _is_array(first) or _is_tensor(first):
        return _from_regions(kind, [_region_of_array(one) if _is_array(one) else _region_of_tensor(one)
                                    for one in descs])
    return _refused("descriptors cannot be made from a list of %s", type(first).__name__)


def convert_remote(descs, mem_type=None):
    """A nixlRemoteDList from one, or from tuples (addr, len, dev, agent name); None with an error line."""
    if isinstance(descs, nixlBind.nixlRemoteDList):
        return descs
    if not isinstance(descs, list) or mem_type is None or (descs and not isinstance(descs[0], tuple)):
        return _refused("remote descriptors are a nixlRemoteDList, or tuples (addr, len, dev, agent) with mem_type")
    return nixlBind.nixlRemoteDList(MEMS[mem_type], descs)


class _Unpickler(pickle.Unpickler):
    """Reads plain builtins and our list classes, nothing else: the bytes come from a peer."""

    _allowed = {("nixl._native", "nixlXferDList"), ("nixl._native", "nixlRegDList"), ("nixl._native", "nixlRemoteDList"),
                ("copyreg", "__newobj__"), ("builtins", "bytearray"), ("builtins", "complex")}

    def find_class(self, module, name):
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"serialized descriptors may not hold {module}.{name}")
        return super().find_class(module, name)


def unpack(serialized):
    """What a peer's get_serialized_descs was given: lists and plain builtins only."""
    if not isinstance(serialized, (bytes, bytearray, memoryview)):
        raise TypeError(f"serialized descriptors are {serialized!r}; bytes are needed")
    if serialized[:8] == b"NIXLDESC":
        return _native.unpack_descs(bytes(serialized))
    return _Unpickler(io.BytesIO(serialized)).load()
