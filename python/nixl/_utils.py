"""Plain memory for examples and tests: page-aligned blocks by address."""
import ctypes as _ctypes
import operator as _operator
import os as _os

_libc = _ctypes.CDLL(None, use_errno=True)
_libc.posix_memalign.argtypes = [_ctypes.POINTER(_ctypes.c_void_p), _ctypes.c_size_t, _ctypes.c_size_t]
_libc.free.argtypes = [_ctypes.c_void_p]
_libc.memcmp.argtypes = [_ctypes.c_void_p, _ctypes.c_void_p, _ctypes.c_size_t]


def malloc_passthru(size):
    """Address (int) of `size` bytes, 4096-aligned. Freed by free_passthru. ValueError: size is negative."""
    if size < 0:
        raise ValueError(f"size is {size}; 0 or more bytes are allowed")
    block = _ctypes.c_void_p()
    failure = _libc.posix_memalign(_ctypes.byref(block), 4096, max(_operator.index(size), 1))
    if failure:
        raise MemoryError(f"{size} bytes cannot be allocated: {_os.strerror(failure)}")
    return block.value


def free_passthru(addr):
    """Frees what malloc_passthru gave; anything else crashes."""
    _libc.free(_operator.index(addr))


def ba_buf(addr, size):
    """Fills `size` bytes at `addr` with 0xBA."""
    _ctypes.memset(addr, 0xBA, size)


def verify_transfer(addr_a, addr_b, size):
    """AssertionError naming the first offset at which the two blocks differ."""
    if size == 0 or _libc.memcmp(addr_a, addr_b, size) == 0:
        return
    a, b = _ctypes.string_at(addr_a, size), _ctypes.string_at(addr_b, size)
    at = next(i for i in range(size) if a[i] != b[i])
    raise AssertionError(f"blocks differ at offset {at} of {size}: 0x{a[at]:02x} != 0x{b[at]:02x}")
