"""Where a tensor lies: torch tensors by their methods, everything else as numpy sees it. torch itself is not needed."""

import numpy


class MemoryView:
    """Address, length, kind ("DRAM" or "VRAM") and device of a contiguous tensor or array; keeps it alive."""

    def __init__(self, tensor):
        self.tensor, self.shape = tensor, tuple(tensor.shape)
        if hasattr(tensor, "data_ptr"):
            if not tensor.is_contiguous():
                raise ValueError(f"a contiguous tensor is needed; this one has strides {tuple(tensor.stride())}")
            self.address, self.itemsize = tensor.data_ptr(), tensor.element_size()
            self.kind = "VRAM" if tensor.is_cuda else "DRAM"
            self.device = tensor.get_device() if tensor.is_cuda else 0
        else:
            array = numpy.asarray(tensor)
            if not array.flags["C_CONTIGUOUS"]:
                raise ValueError(f"a C-contiguous array is needed; this one has strides {array.strides}")
            self.address, self.itemsize, self.kind, self.device = array.ctypes.data, array.itemsize, "DRAM", 0
        self.nbytes = int(numpy.prod(self.shape)) * self.itemsize

    def descriptor(self):
        """(address, bytes, device) as nixl takes it."""
        return self.address, self.nbytes, self.device
