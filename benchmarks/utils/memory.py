"""Buffers of the benchmarks: host memory, GPU memory through the CUDA driver, patterns that show offset errors."""

import ctypes
import fcntl
import importlib.util
import mmap
import os

import numpy

from utils.benchmark_base import Skip

INITIATOR_FILL, TARGET_FILL = 0xBB, 0xAA
_PERIOD = 1048573  # a prime: a copy that is off by any power of two shows


def pattern(size, number, fill, salt=0):
    """`size` bytes of pattern `number`, mixed with the position, so that a wrong offset cannot compare equal."""
    generator = numpy.random.default_rng([number, salt])
    base = generator.integers(0, 256, min(size, _PERIOD), dtype=numpy.uint8) ^ numpy.uint8(fill)
    return numpy.resize(base, size)


def first_difference(seen, wanted):
    """Offset of the first byte that differs, or None."""
    if numpy.array_equal(seen, wanted):
        return None
    return int(numpy.flatnonzero(seen != wanted)[0])


class HostBuffer:
    """Touched, page-aligned host memory: private pages, as malloc, numpy and torch have them, or (`shared`) a memory file that
    cannot shrink. `address`, `size`, `device` describe it to an agent."""

    kind, device = "DRAM", 0

    def __init__(self, size, shared=False):
        if shared:
            self._file = os.memfd_create("buffer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self._file, max(size, 1))
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            self._map = mmap.mmap(self._file, max(size, 1), flags=mmap.MAP_SHARED)
        else:
            self._file = None
            self._map = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.array = numpy.frombuffer(self._map, dtype=numpy.uint8, count=size)
        self.array[:] = 0
        self.address, self.size = self.array.ctypes.data, size

    def write(self, values, offset=0):
        self.array[offset:offset + len(values)] = values

    def read(self, offset=0, size=None):
        return self.array[offset:self.size if size is None else offset + size]

    def close(self):
        self.array = None
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Cuda:
    """The few driver calls that buffers need; loaded on first use. Skip when there is no driver or GPU."""

    _shared = None

    @classmethod
    def get(cls):
        if cls._shared is None:
            cls._shared = cls()
        return cls._shared

    def __init__(self):
        try:
            self.lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Skip(f"VRAM needs the CUDA driver: {error}") from None
        code = self.lib.cuInit(0)
        if code:
            raise Skip(f"VRAM needs a CUDA GPU: cuInit answered {code}")
        self._contexts = {}

    def check(self, code, what):
        if code:
            text = ctypes.c_char_p()
            self.lib.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{what}: CUDA error {code} ({(text.value or b'?').decode()})")

    def use(self, device):
        if device not in self._contexts:
            count = ctypes.c_int()
            self.check(self.lib.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
            if device >= count.value:
                raise Skip(f"VRAM on GPU {device} was asked for, this machine has {count.value}")
            context = ctypes.c_void_p()
            self.check(self.lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), f"context of GPU {device}")
            self._contexts[device] = context
        self.check(self.lib.cuCtxSetCurrent(self._contexts[device]), f"context of GPU {device}")


class LockedBuffer(HostBuffer):
    """Host memory that is page-locked for all GPUs, as torch's pin_memory gives it. Made in a context of GPU `owner`."""

    def __init__(self, size, owner=0):
        self._cuda, self.size = Cuda.get(), size
        self._cuda.use(owner)
        pointer = ctypes.c_void_p()
        portable_and_mapped = 3
        self._cuda.check(self._cuda.lib.cuMemHostAlloc(ctypes.byref(pointer), ctypes.c_size_t(size), portable_and_mapped),
                         f"cuMemHostAlloc of {size} bytes")
        self.address = pointer.value
        self.array = numpy.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint8)), (size,))
        self.array[:] = 0

    def close(self):
        if self.array is not None:
            self.array = None
            self._cuda.lib.cuMemFreeHost(ctypes.c_void_p(self.address))


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _AllocationProperties(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("requested_handle_types", ctypes.c_int), ("location", _Location),
                ("win32", ctypes.c_void_p), ("compression", ctypes.c_ubyte), ("rdma", ctypes.c_ubyte),
                ("usage", ctypes.c_ushort), ("reserved", ctypes.c_ubyte * 4)]


class _Access(ctypes.Structure):
    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


class DeviceBuffer:
    """GPU memory: plain, or (`vmm`) from the virtual-memory interface with exportable handles, one for the whole buffer
    or one for every `piece` bytes, as expandable segments have them."""

    kind = "VRAM"

    def __init__(self, size, device, vmm=False, piece=None):
        self._cuda, self.size, self.device = Cuda.get(), size, device
        self._cuda.use(device)
        self._vmm_size = 0
        pointer = ctypes.c_uint64()
        if vmm:
            pointer = self._allocate_vmm(size, piece)
        else:
            self._cuda.check(self._cuda.lib.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)),
                             f"cuMemAlloc of {size} bytes on GPU {device}")
        self.address = pointer.value

    def _allocate_vmm(self, size, piece):
        lib, check = self._cuda.lib, self._cuda.check
        properties = _AllocationProperties(type=1, requested_handle_types=1, location=_Location(1, self.device))
        granularity = ctypes.c_size_t()
        check(lib.cuMemGetAllocationGranularity(ctypes.byref(granularity), ctypes.byref(properties), 0), "granularity")
        piece = -(-(piece or size) // granularity.value) * granularity.value
        self._vmm_size = -(-size // piece) * piece
        handle, pointer = ctypes.c_uint64(), ctypes.c_uint64()
        check(lib.cuMemAddressReserve(ctypes.byref(pointer), ctypes.c_size_t(self._vmm_size), ctypes.c_size_t(0),
                                      ctypes.c_uint64(0), ctypes.c_uint64(0)), "cuMemAddressReserve")
        for at in range(0, self._vmm_size, piece):
            check(lib.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(piece), ctypes.byref(properties),
                                  ctypes.c_uint64(0)), f"cuMemCreate of {piece} bytes on GPU {self.device}")
            check(lib.cuMemMap(ctypes.c_uint64(pointer.value + at), ctypes.c_size_t(piece), ctypes.c_size_t(0), handle,
                               ctypes.c_uint64(0)), "cuMemMap")
            check(lib.cuMemRelease(handle), "cuMemRelease")
        access = _Access(_Location(1, self.device), 3)
        check(lib.cuMemSetAccess(pointer, ctypes.c_size_t(self._vmm_size), ctypes.byref(access), ctypes.c_size_t(1)),
              "cuMemSetAccess")
        return pointer

    def write(self, values, offset=0):
        values = numpy.ascontiguousarray(values)
        self._cuda.use(self.device)
        self._cuda.check(self._cuda.lib.cuMemcpyHtoD_v2(ctypes.c_uint64(self.address + offset),
                                                        ctypes.c_void_p(values.ctypes.data),
                                                        ctypes.c_size_t(len(values))), "copy to the GPU")

    def read(self, offset=0, size=None):
        values = numpy.empty(self.size - offset if size is None else size, dtype=numpy.uint8)
        self._cuda.use(self.device)
        self._cuda.check(self._cuda.lib.cuMemcpyDtoH_v2(ctypes.c_void_p(values.ctypes.data),
                                                        ctypes.c_uint64(self.address + offset),
                                                        ctypes.c_size_t(len(values))), "copy from the GPU")
        return values

    def close(self):
        if not self.address:
            return
        self._cuda.use(self.device)
        if self._vmm_size:
            self._cuda.lib.cuMemUnmap(ctypes.c_uint64(self.address), ctypes.c_size_t(self._vmm_size))
            self._cuda.lib.cuMemAddressFree(ctypes.c_uint64(self.address), ctypes.c_size_t(self._vmm_size))
        else:
            self._cuda.lib.cuMemFree_v2(ctypes.c_uint64(self.address))
        self.address = 0


class TorchBuffer(DeviceBuffer):
    """GPU memory as torch's allocator gives it out, here from expandable segments."""

    def __init__(self, size, device):
        torch = _torch()
        self._cuda, self.size, self.device = Cuda.get(), size, device
        self._tensor = torch.zeros(size, dtype=torch.uint8, device=f"cuda:{device}")
        torch.cuda.synchronize(device)
        self.address = self._tensor.data_ptr()
        if not any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot()):
            raise RuntimeError("torch's allocator made no expandable segment of PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")

    def close(self):
        self._tensor, self.address = None, 0


def _torch():
    # Read when torch is imported.
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    import torch

    return torch


def torch_has_cuda():
    return importlib.util.find_spec("torch") is not None and _torch().cuda.is_available()


def make_buffer(kind, size, device=0, vmm=False):
    """A buffer of `kind` ("DRAM" or "VRAM")."""
    return DeviceBuffer(size, device, vmm) if kind == "VRAM" else HostBuffer(size)
