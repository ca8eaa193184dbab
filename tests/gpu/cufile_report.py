#!/usr/bin/env python3
"""What cuFile does on this machine: versions, properties, and for each folder, open mode and setting what it answers.

    python3 tests/gpu/cufile_report.py [FOLDER...]        (default: the temporary folder, /dev/shm, the current one)

Each setting runs in a process of its own, since cuFile reads them once. A line a file: register, 1 MiB written from GPU
memory and read back, bytes compared; below it what cuFile's own log says. Exit 77 without cuFile or a GPU.
"""

import ctypes
import glob
import json
import os
import subprocess
import sys
import sysconfig
import tempfile

SIZE = 1 << 20
COMPAT = {"properties": {"allow_compat_mode": True}}
FORCED = {"properties": {"allow_compat_mode": True, "force_compat_mode": True}}
PLAIN = {"properties": {"allow_compat_mode": True, "vanilla_posix_io_mode": True}}
# name -> (environment, configuration file, parameters of cuFileSetParameterBool set before the driver is opened, CUDA context first)
SETTINGS = {
    "nothing set": ({}, None, {}, True),
    "nothing set, no CUDA context before": ({}, None, {}, False),
    "CUFILE_ALLOW_COMPAT_MODE=true": ({"CUFILE_ALLOW_COMPAT_MODE": "true"}, None, {}, True),
    "CUFILE_FORCE_COMPAT_MODE=true": ({"CUFILE_FORCE_COMPAT_MODE": "true"}, None, {}, True),
    "file: allow": ({}, COMPAT, {}, True),
    "file: allow and force": ({}, FORCED, {}, True),
    "file: vanilla POSIX": ({}, PLAIN, {}, True),
    "parameter: allow": ({}, None, {1: True}, True),
    "parameter: allow and force": ({}, None, {1: True, 2: True}, True),
    "parameter: allow, force, no topology": ({}, None, {1: True, 2: True, 10: True}, True),
}


class Error(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("cuda", ctypes.c_int)]

    def __str__(self):
        return "ok" if self.code == 0 else f"{self.code}" + (f" (CUDA {self.cuda})" if self.cuda else "")


class Description(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("handle", ctypes.c_uint64), ("operations", ctypes.c_void_p)]


class Properties(ctypes.Structure):
    _fields_ = [("nvfs_major", ctypes.c_uint), ("nvfs_minor", ctypes.c_uint), ("poll_threshold", ctypes.c_size_t),
                ("max_direct", ctypes.c_size_t), ("status_flags", ctypes.c_uint), ("control_flags", ctypes.c_uint),
                ("features", ctypes.c_uint), ("cache", ctypes.c_uint), ("buffer_cache", ctypes.c_uint), ("pinned", ctypes.c_uint),
                ("batch_size", ctypes.c_uint), ("batch_timeout", ctypes.c_uint), ("room", ctypes.c_uint * 32)]


def find_cufile():
    """The places that the backend looks at, and the Python environment's."""
    site = sysconfig.get_paths()["purelib"]
    places = [os.environ.get("NIXL_CUFILE_LIBRARY"), "libcufile.so.0", "/usr/local/cuda/lib64/libcufile.so.0",
              *sorted(glob.glob(f"{site}/nvidia/*/lib/libcufile.so.0"))]
    for place in filter(None, places):
        try:
            return place, ctypes.CDLL(place)
        except OSError:
            continue
    return None, None


def try_file(cufile, memory, cuda, path, flags):
    cufile.cuFileWrite.restype = cufile.cuFileRead.restype = ctypes.c_ssize_t
    fd = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    try:
        handle, about = ctypes.c_void_p(), Description(1, fd, None)
        error = cufile.cuFileHandleRegister(ctypes.byref(handle), ctypes.byref(about))
        if error.code:
            return f"register {error}"
        sent = os.urandom(SIZE)
        cuda.cuMemcpyHtoD_v2(memory, sent, ctypes.c_size_t(SIZE))
        wrote = cufile.cuFileWrite(handle, memory, ctypes.c_size_t(SIZE), ctypes.c_long(0), ctypes.c_long(0))
        cuda.cuMemsetD8_v2(memory, ctypes.c_ubyte(0), ctypes.c_size_t(SIZE))
        read = cufile.cuFileRead(handle, memory, ctypes.c_size_t(SIZE), ctypes.c_long(0), ctypes.c_long(0))
        seen = ctypes.create_string_buffer(SIZE)
        cuda.cuMemcpyDtoH_v2(seen, memory, ctypes.c_size_t(SIZE))
        cufile.cuFileHandleDeregister(handle)
        return f"register ok, write {wrote}, read {read}, {'bytes equal' if seen.raw == sent else 'BYTES DIFFER'}"
    finally:
        os.close(fd)
        os.unlink(path)


def one_setting(name, folders):
    _, _, parameters, context_first = SETTINGS[name]
    place, cufile = find_cufile()
    cuda = ctypes.CDLL("libcuda.so.1")
    for function in ("cuFileDriverOpen", "cuFileDriverGetProperties", "cuFileHandleRegister", "cuFileSetParameterBool", "cuFileBufRegister"):
        if hasattr(cufile, function):
            getattr(cufile, function).restype = Error
    cufile.cuFileHandleDeregister.restype = None
    cuda.cuInit(0)
    context, memory = ctypes.c_void_p(), ctypes.c_void_p()

    def make_context():
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
        return cuda.cuCtxSetCurrent(context)

    if context_first:
        make_context()
    for parameter, value in parameters.items():
        print(f"  cuFileSetParameterBool({parameter}) {cufile.cuFileSetParameterBool(parameter, ctypes.c_bool(value))}")
    print(f"  cuFileDriverOpen {cufile.cuFileDriverOpen()}")
    if not context_first:
        make_context()
    version, properties = ctypes.c_int(), Properties()
    cufile.cuFileGetVersion(ctypes.byref(version))
    answer = cufile.cuFileDriverGetProperties(ctypes.byref(properties))
    print(f"  {place}: version {version.value}, properties {answer}: nvidia-fs {properties.nvfs_major}.{properties.nvfs_minor}, "
          f"status flags {properties.status_flags:#x}, control flags {properties.control_flags:#x}, features {properties.features:#x}")
    print(f"  cuMemAlloc {cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(SIZE))}, "
          f"cuFileBufRegister {cufile.cuFileBufRegister(memory, ctypes.c_size_t(SIZE), 0)}")
    for folder in folders:
        for mode, flags in (("plain", 0), ("O_DIRECT", os.O_DIRECT)):
            try:
                text = try_file(cufile, memory, cuda, os.path.join(folder, f"nixl_cufile_{os.getpid()}"), flags)
            except OSError as error:
                text = str(error)
            print(f"  {folder} {mode}: {text}", flush=True)


def file_system(folder):
    where = os.path.realpath(folder)
    rows = [line.split() for line in open("/proc/mounts")]
    best = max((row for row in rows if (where + "/").startswith(row[1].rstrip("/") + "/")), key=lambda row: len(row[1]))
    return f"{folder}: {best[2]} on {best[0]} at {best[1]} ({best[3]})"


def main():
    if sys.argv[1:2] == ["--setting"]:
        one_setting(sys.argv[2], sys.argv[3:])
        return 0
    folders = sys.argv[1:] or list(dict.fromkeys([tempfile.gettempdir(), "/dev/shm", os.getcwd()]))
    place, _ = find_cufile()
    if not place or not os.path.exists("/dev/nvidiactl"):
        print(f"SKIP: {'no GPU: there is no /dev/nvidiactl' if place else 'libcufile.so.0 is not to be found'}")
        return 77
    for line in [f"kernel {os.uname().release}", *map(file_system, folders)]:
        print(line)
    for path in ("/proc/driver/nvidia-fs/version", "/proc/driver/nvidia-fs/stats", "/run/udev", "/etc/cufile.json", "/dev/nvidia-fs0", "/sys/dev/block"):
        print(f"{path}: {'there' if os.path.exists(path) else 'not there'}")
    for name, (environment, configuration, _, _) in SETTINGS.items():
        print(f"=== {name}")
        with tempfile.TemporaryDirectory() as scratch:
            log = os.path.join(scratch, "cufile.log")
            env = {**os.environ, "CUFILE_LOGGING_LEVEL": "INFO", "CUFILE_LOGFILE_PATH": log, **environment}
            if configuration:
                env["CUFILE_ENV_PATH_JSON"] = os.path.join(scratch, "cufile.json")
                with open(env["CUFILE_ENV_PATH_JSON"], "w") as file:
                    json.dump({"logging": {"level": "INFO"}, **configuration}, file)
            done = subprocess.run([sys.executable, os.path.abspath(__file__), "--setting", name, *folders], env=env, capture_output=True,
                                  text=True, timeout=60)
            print(done.stdout, end="")
            if done.returncode:
                print(f"  ended with {done.returncode}: {done.stderr[-500:]}")
            lines = []
            for path in glob.glob(f"{scratch}/*log*"):
                lines += open(path, errors="replace").read().splitlines()
            said = dict.fromkeys(line.split("] ", 1)[-1].strip() for line in lines if "ERROR" in line or "WARN" in line or "NOTICE" in line)
            for line in list(said)[:40]:
                print(f"    log: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
