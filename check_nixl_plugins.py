#!/usr/bin/env python3
"""Says which nixl backends work on this machine, and why the others do not.

    python check_nixl_plugins.py [--json] [--backend NAME]

Each available backend is created in an agent that is thrown away. Exit status 0 when UCX and POSIX work, or with --backend when that
one does; else 1.
"""
import argparse
import ctypes
import glob
import json
import logging
import os
import platform
import sys


def _driver():
    """(version text, GPU names), or (why there is none, [])."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"none ({error})", []
    code, version, count = cuda.cuInit(0), ctypes.c_int(), ctypes.c_int()
    if code:
        return f"libcuda.so.1 is there, cuInit fails with {code}", []
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for number in range(count.value):
        name = ctypes.create_string_buffer(256)
        cuda.cuDeviceGetName(name, 256, number)
        names.append(name.value.decode())
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}", names


def _gds():
    """What GPUDirect Storage needs, and what of it is here."""
    try:
        ctypes.CDLL("libcufile.so.0")
        library = "libcufile.so.0 loads"
    except OSError as error:
        library = str(error)
    module = "loaded" if os.path.exists("/proc/driver/nvidia-fs") else "not loaded"
    return f"/usr/local/cuda/gds {'exists' if os.path.isdir('/usr/local/cuda/gds') else 'is missing'}; {library}; nvidia-fs {module}"


def _created(name):
    """None when an agent can create the backend, else the reason."""
    import nixl
    try:
        agent = nixl.nixl_agent("check_nixl_plugins", nixl.nixl_agent_config(backends=[]))
        agent.create_backend(name, {})
    except Exception as error:
        return str(error)
    return None


def _line(name, about):
    letters = "".join(letter if about[key] else "-" for letter, key in (("R", "remote"), ("L", "local"), ("N", "notif")))
    kinds = " ".join(kind.removesuffix("_SEG") for kind in about["mem_types"])
    state = "available" if about["created"] else "available, creation fails" if about["available"] else "not available"
    return f"{name:<12} {state:<25} {kinds:<14} {letters}  {about['reason']}".rstrip()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--backend", help="look at this backend only")
    options = parser.parse_args(arguments)
    try:
        import nixl
        from nixl import _native
        report = nixl.plugin_report()
    except Exception as error:
        print(json.dumps({"error": str(error)}) if options.json else f"nixl cannot be imported: {error}")
        return 1
    asked = _native.canonical_backend(options.backend) if options.backend else None
    if asked:
        report = {asked: report.get(asked) or {"available": False, "reason": "there is no backend of this name", "mem_types": [],
                                               "remote": False, "local": False, "notif": False, "params": {}}}
    if "NIXL_LOG_LEVEL" not in os.environ:
        logging.getLogger("nixl").setLevel(logging.WARNING)
    for name, about in report.items():
        about["created"] = False
        if about["available"] and name in _listed():
            failure = _created(name)
            about["created"] = failure is None
            about["reason"] = failure or about["reason"]
        elif about["available"]:
            about["created"] = True
            about["reason"] = about["reason"] or "used by itself beside network backends, for peers of this host"
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report, nixl, _native)
    return 0 if all(report.get(name, {}).get("created") for name in ([asked] if asked else ["UCX", "POSIX"])) else 1


def _listed():
    import nixl
    try:
        return set(nixl.nixl_agent("check_nixl_plugins", nixl.nixl_agent_config(backends=[])).get_plugin_list())
    except RuntimeError:
        return set()


def _print(report, nixl, native):
    from nixl._installed import others as other_distributions
    driver, gpus = _driver()
    modules = sorted(os.path.basename(path) for path in glob.glob(native.plugin_directory() + "/*.so"))
    print(f"nixl {nixl.__version__}, {native.library_directory()}/libnixl.so")
    print(f"plug-ins: {native.plugin_directory()} ({', '.join(modules) or 'empty'}); NIXL_PLUGIN_DIR={os.environ.get('NIXL_PLUGIN_DIR', '')}")
    print(f"Python {platform.python_version()}; driver: {driver}; GPUs: {', '.join(gpus) or 'none'}")
    if {"GDS", "GDS_MT"} & report.keys():
        print(f"GDS: {_gds()}")
    for owner in other_distributions():
        print(f"warning: the distribution {owner} is installed too and may own the same files; pip uninstall {owner}")
    print("\nR: reaches other agents, L: serves an agent alone, N: carries notifications")
    for name, about in report.items():
        print(_line(name, about))


if __name__ == "__main__":
    sys.exit(main())
