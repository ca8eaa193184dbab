"""./run doctor: what works on this machine, what does not, and what to do about it. Never raises; exit code 0 if the agent
and expert parallel both work on at least one device."""
import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys


def read(path, default="not there"):
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return default


def machine():
    cpu = next((line.split(":", 1)[1].strip() for line in read("/proc/cpuinfo").splitlines() if "model name" in line), "?")
    memory_kib = int(next(line.split()[1] for line in read("/proc/meminfo").splitlines() if line.startswith("MemTotal")))
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores ({cpu})"
    yield "memory", f"{memory_kib >> 20} GiB"
    yield "python", f"{platform.python_version()} at {sys.executable}"
    yield "compilers", ", ".join(name for name in ("g++", "clang++", "nvcc", "cmake", "ninja") if shutil.which(name)) or "none"
    yama = read("/proc/sys/kernel/yama/ptrace_scope", "")
    yield "copies between processes", {
        "": "allowed (no Yama)", "0": "allowed", "1": "allowed between connected agents (Yama 1: they permit each other)",
    }.get(yama, f"forbidden by Yama ptrace_scope {yama}; same-host DRAM falls back to the network backend")
    uring = read("/proc/sys/kernel/io_uring_disabled", "0")
    yield "io_uring", "allowed" if uring == "0" else f"restricted by kernel.io_uring_disabled = {uring}"


def gpus():
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        yield "CUDA driver", f"none ({error})"
        return
    version, count = ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDriverGetVersion(ctypes.byref(version)) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        yield "CUDA driver", f"libcuda.so.1 is there, but cuInit answers error {status}"
        return
    yield "CUDA driver", f"supports CUDA {version.value // 1000}.{version.value % 1000 // 10}; {count.value} GPUs"
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    for line in listing.stdout.splitlines() if listing else ():
        yield "", line.split(" (UUID")[0]


def packages():
    for name in ("nixl", "numpy", "torch", "libucx-cu13"):
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "from the source tree" if importlib.util.find_spec(name) else "not installed"
    try:
        from nixl._installed import others as other_distributions

        others = other_distributions()
    except Exception:  # nixl cannot be imported: told with the backends
        others = []
    if others:
        yield "conflict", f"{', '.join(others)} install the same module names; pip uninstall {' '.join(others)}"


def expert_parallel():
    try:
        import nixl_ep

        yield "cpu", "", True
        reason = nixl_ep.cuda_unavailable_reason()
        yield "cuda", reason, not reason
    except Exception as error:  # the page must be printed whatever is broken
        yield "nixl_ep", f"{type(error).__name__}: {error}", False


def backends():
    try:
        import nixl

        return nixl.plugin_report(), ""
    except Exception as error:
        return {}, f"{type(error).__name__}: {error}"


def show(title, rows):
    print(f"\n{title}")
    for name, text in rows:
        print(f"  {name:<26} {text}")


def main():
    parser = argparse.ArgumentParser(prog="./run doctor", description="what works here, what does not, and why")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options = parser.parse_args()
    report, broken = backends()
    paths = list(expert_parallel())
    if options.json:
        print(json.dumps({"machine": dict(machine()), "gpus": [text for _, text in gpus()], "packages": dict(packages()),
                          "ep": {name: {"available": ok, "reason": reason} for name, reason, ok in paths},
                          "backends": report, "backends_error": broken}, indent=1))
    else:
        show("Machine", [*machine(), *gpus()])
        show("Packages", packages())
        show("Expert parallel (nixl_ep)", [(name, "works" if ok else f"not here: {reason}") for name, reason, ok in paths])
        if broken:
            show("Agent (nixl)", [("nixl", broken)])
        else:
            show("Backends of the agent (nixl)", [
                (name, ("works      " + " ".join(entry["mem_types"]) + (f"   {entry['reason']}" if entry["reason"] else ""))
                 if entry["available"] else f"not here   {entry['reason']}") for name, entry in report.items()])
        print()
    return 0 if not broken and any(ok for _, _, ok in paths) and any(e["available"] for e in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
