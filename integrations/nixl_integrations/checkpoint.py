"""Checkpoints: the tensors of a model to one file or object and back, through a nixl storage backend.

    save(model, "/mnt/ckpt/model.bin")      # a module, or a mapping of names to tensors
    load(model, "/mnt/ckpt/model.bin")      # into the same tensors, in place

Beside the data lies `<path>.json`: name, dtype, shape, offset and CRC-32 of every tensor. It is written last, so a checkpoint
whose index exists is complete; after an error or a kill nothing with the final names is half written.
"""

import contextlib
import json
import logging
import os
import time
import zlib

import numpy
import torch

import nixl

FORMAT = 1
AUTO = ("GDS", "GDS_MT", "POSIX")
_ALIGN = 4096  # of larger tensors in files, so that direct paths need no bounce
_GROUP_BYTES = 64 << 20  # bytes between two reports of progress
_LONGEST_INDEX = 1 << 30
log = logging.getLogger("nixl.checkpoint")


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, unfinished, damaged, or not of this model; the text says which."""


def save(model, path, backend="auto", *, backend_params=None, progress=None):
    """Writes all tensors of `model`. Returns {"bytes", "seconds", "backend", "path"}.

    model           torch.nn.Module, or mapping name -> torch.Tensor (any dtype, device and stride)
    path            of the file, or with backend "OBJ" and "AZURE_BLOB" the key of the object
    backend         "auto" takes the first usable of GDS, GDS_MT, POSIX; else the name of a storage backend
    backend_params  its init parameters (str to str)
    progress        called with (bytes done, bytes in all) from this thread
    Errors: CheckpointError, OSError, or the nixl error of the transfer; then a file is as it was before, while an object may hold
    data that no index vouches for.
    """
    tensors = _tensors_of(model)
    with _Target(path, backend, backend_params) as target:
        entries, total = _layout(tensors, target.align)
        staged = {name: _plain(tensor, target) for name, tensor in tensors.items()}
        for entry in entries:
            entry["crc32"] = zlib.crc32(_bytes_of(staged[entry["name"]]))
        begin = time.perf_counter()
        with target.writing(total, json.dumps({"format": FORMAT, "bytes": total, "tensors": entries}, indent=1).encode()):
            target.transfer("WRITE", entries, staged, total, progress)
        seconds = time.perf_counter() - begin
        return {"bytes": total, "seconds": seconds, "backend": target.backend, "path": target.used_path}


def load(model, path, backend="auto", *, backend_params=None, progress=None, verify=True):
    """Reads a checkpoint into the tensors of `model`, in place. Returns as save() does.

    Every tensor of the model must be in the checkpoint with the same dtype and shape; `verify` compares CRC-32.
    """
    tensors = _tensors_of(model)
    with _Target(path, backend, backend_params) as target:
        index = target.get_index()
        known = {entry["name"]: entry for entry in index["tensors"]}
        entries = [_matching(known, name, tensor, path) for name, tensor in tensors.items()]
        staged = {name: _plain(tensor, target) for name, tensor in tensors.items()}
        begin = time.perf_counter()
        with target.reading():
            target.transfer("READ", entries, staged, sum(entry["bytes"] for entry in entries), progress)
        seconds = time.perf_counter() - begin
        for entry in entries if verify else ():
            if zlib.crc32(_bytes_of(staged[entry["name"]])) != entry["crc32"]:
                raise CheckpointError(f"{path}: tensor {entry['name']!r} is damaged: its CRC-32 differs from the index")
        with torch.no_grad():
            for name, tensor in tensors.items():
                if staged[name] is not tensor:
                    tensor.copy_(staged[name])
        return {"bytes": sum(e["bytes"] for e in entries), "seconds": seconds, "backend": target.backend, "path": target.used_path}


def exists(path, backend="auto", *, backend_params=None):
    """Whether a complete checkpoint lies there."""
    with _Target(path, backend, backend_params) as target:
        try:
            target.get_index()
        except CheckpointError:
            return False
        return True


def _tensors_of(model):
    if isinstance(model, torch.nn.Module):
        model = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {name: tensor.detach() for name, tensor in model.items()}
    if not tensors:
        raise CheckpointError("there is no tensor to save or load")
    return tensors


def _size(tensor):
    return tensor.numel() * tensor.element_size()


def _layout(tensors, align):
    entries, offset = [], 0
    for name, tensor in tensors.items():
        size = _size(tensor)
        if align > 1 and size >= align:
            offset = (offset + align - 1) // align * align
        entries.append({"name": name, "dtype": str(tensor.dtype), "shape": list(tensor.shape), "offset": offset, "bytes": size})
        offset += size
    return entries, offset


def _matching(known, name, tensor, path):
    entry = known.get(name)
    if entry is None:
        raise CheckpointError(f"{path}: no tensor {name!r}; it holds {', '.join(sorted(known)[:5])}, ...")
    if entry["dtype"] != str(tensor.dtype) or entry["shape"] != list(tensor.shape):
        raise CheckpointError(f"{path}: tensor {name!r} is {entry['dtype']} {entry['shape']}, wanted {tensor.dtype} {list(tensor.shape)}")
    if entry["bytes"] != _size(tensor) or entry["offset"] < 0:  # these say what is read to where
        raise CheckpointError(f"{path}: tensor {name!r} lies at offset {entry['offset']} with {entry['bytes']} bytes in the index, "
                              f"it has {_size(tensor)}")
    return entry


def _checked(index):
    """The index with the fields that a reader uses, of the right kinds; TypeError and KeyError say what is wrong."""
    if index["format"] != FORMAT:
        raise CheckpointError(f"format {index['format']}, this program reads {FORMAT}")
    for entry in index["tensors"]:
        for field, kind in (("name", str), ("dtype", str), ("shape", list), ("offset", int), ("bytes", int), ("crc32", int)):
            if type(entry[field]) is not kind:
                raise TypeError(f"{field} of a tensor is {entry[field]!r}")
    return index


def _plain(tensor, target):
    """The tensor itself where the backend can use its memory, else a contiguous copy in host memory."""
    if tensor.is_conj() or tensor.is_neg():  # a view whose memory holds other values
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.device.type == "cuda" and not target.takes_vram:
        return tensor.cpu().contiguous()
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _bytes_of(tensor):
    return memoryview(tensor.cpu().reshape(-1).view(torch.uint8).numpy())


def _choose(backend):
    if backend != "auto":
        return backend
    report = nixl.plugin_report()
    for name in AUTO:
        if report.get(name, {}).get("available"):
            return name
        log.info("checkpoint: %s is not used: %s", name, report.get(name, {}).get("reason", "unknown"))
    raise CheckpointError("no storage backend is usable here; see nixl.plugin_report()")


def _length(text, path):
    """What stands before an index that is an object: sixteen digits."""
    if not text.isdigit() or int(text) > _LONGEST_INDEX:
        raise CheckpointError(f"{path} is no index of a checkpoint: it begins with {text!r}")
    return int(text)


class _Target:
    """The place of one checkpoint: an agent with one storage backend, the data and the index."""

    def __init__(self, path, backend, params):
        self.path, self.index_path, self.backend = os.fspath(path), os.fspath(path) + ".json", _choose(backend)
        self.agent = nixl.nixl_agent(f"checkpoint_{os.getpid()}_{id(self):x}", nixl.nixl_agent_config(backends=[]))
        self.agent.create_backend(self.backend, {key: str(value) for key, value in (params or {}).items()})
        kinds = self.agent.get_backend_mem_types(self.backend)
        self.takes_vram = "VRAM_SEG" in kinds
        self.is_object = "OBJ_SEG" in kinds
        self.align = 1 if self.is_object else _ALIGN
        self.used_path, self._dev, self._fd, self._next = "", None, -1, 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.agent = None

    @contextlib.contextmanager
    def writing(self, total, index):
        """For the transfer of the data; the index follows it. Files get their names when both are on the disk."""
        if self.is_object:
            with self._object(self.path):
                yield
            self._put_index_object(index)
            return
        data, beside = f"{self.path}.partial", f"{self.index_path}.partial"
        try:
            with self._file(data, os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                os.truncate(self._fd, total)
                yield
                os.fsync(self._fd)
            with open(beside, "wb") as file:
                file.write(index)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.index_path)  # it would vouch for the new data
            os.rename(data, self.path)
            os.rename(beside, self.index_path)
        except BaseException:
            for partial in (data, beside):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
            raise
        folder = os.open(os.path.dirname(os.path.abspath(self.path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def reading(self):
        return self._object(self.path) if self.is_object else self._file(self.path, os.O_RDONLY)

    @contextlib.contextmanager
    def _file(self, path, flags):
        self._fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
        try:
            with self._registered(self._fd, path, "FILE"):
                yield
        finally:
            os.close(self._fd)

    def _object(self, key):
        self._next += 1
        return self._registered(self._next, key, "OBJ")

    @contextlib.contextmanager
    def _registered(self, dev, meta, kind):
        regs = self.agent.register_memory([(0, 0, dev, meta)], kind)
        self._dev, self._kind = dev, kind
        try:
            yield
        finally:
            self.agent.deregister_memory(regs)

    def transfer(self, operation, entries, tensors, total, progress):
        done = 0
        for group in self._groups(operation, entries):
            memory = [tensors[entry["name"]] for entry in group]
            regs = self.agent.register_memory(memory)
            try:
                there = [(entry["offset"], entry["bytes"], self._dev) for entry in group]
                handle = self.agent.initialize_xfer(operation, self.agent.get_xfer_descs(memory),
                                                    self.agent.get_xfer_descs(there, self._kind), self.agent.name)
                try:
                    self.used_path = self.agent.query_xfer_path(handle)
                    if self.agent.transfer(handle) != "DONE":
                        handle.wait()
                finally:
                    self.agent.release_xfer_handle(handle)
            finally:
                self.agent.deregister_memory(regs)
            done += sum(entry["bytes"] for entry in group)
            if progress:
                progress(done, total)

    def _groups(self, operation, entries):
        """Lists of entries of about _GROUP_BYTES; the write of an object is one, since it replaces the whole object."""
        group, size = [], 0
        for entry in entries:
            if entry["bytes"] == 0:
                continue
            group.append(entry)
            size += entry["bytes"]
            if size >= _GROUP_BYTES and not (self.is_object and operation == "WRITE"):
                yield group
                group, size = [], 0
        if group:
            yield group

    def _put_index_object(self, text):
        # The length goes first, so that it can be read without asking for the object's size.
        text = b"%016d" % len(text) + text
        with self._object(self.index_path):
            self._move_bytes("WRITE", numpy.frombuffer(bytearray(text), dtype=numpy.uint8), 0)

    def get_index(self):
        missing = CheckpointError(f"{self.path}: there is no complete checkpoint ({self.index_path} does not exist)")
        if self.is_object:
            if self.agent.query_memory([(0, 0, 0, self.index_path)], self.backend, "OBJ") == [None]:
                raise missing
            with self._object(self.index_path):
                head = numpy.zeros(16, numpy.uint8)
                self._move_bytes("READ", head, 0)
                body = numpy.zeros(_length(head.tobytes(), self.index_path), numpy.uint8)
                self._move_bytes("READ", body, 16)
                text = body.tobytes()
        else:
            try:
                with open(self.index_path, "rb") as f:
                    text = f.read()
            except FileNotFoundError:
                raise missing from None
        try:
            return _checked(json.loads(text))
        except CheckpointError as error:
            raise CheckpointError(f"{self.index_path}: {error}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{self.index_path} is no index of a checkpoint: {error}") from None

    def _move_bytes(self, operation, array, offset):
        regs = self.agent.register_memory([array])
        handle = self.agent.initialize_xfer(operation, self.agent.get_xfer_descs([array]),
                                            self.agent.get_xfer_descs([(offset, array.nbytes, self._dev)], self._kind), self.agent.name)
        try:
            if self.agent.transfer(handle) != "DONE":
                handle.wait()
        finally:
            self.agent.release_xfer_handle(handle)
            self.agent.deregister_memory(regs)
