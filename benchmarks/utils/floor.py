"""The floor programs: what the machine, or the library underneath, gives to a plain program, in the same run as our figures."""

import json
import os
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_LIMIT_S = 120


def program(name):
    """Where a floor program was built, or None."""
    folders = [_ROOT / "build" / preset / "benchmarks" / "floor" for preset in ("dev", "release", "cpu")]
    if os.environ.get("NIXL_PREBUILT"):
        folders.insert(0, pathlib.Path(os.environ["NIXL_PREBUILT"]))
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def floor(name, *arguments):
    """The figures of a floor program, or None where it was not built."""
    path = program(name)
    if path is None:
        return None
    return json.loads(subprocess.run([path, *arguments], capture_output=True, text=True, timeout=_LIMIT_S, check=True).stdout)


def nccl():
    """GB/s that NCCL gives between two GPUs, or None where it cannot run."""
    script = pathlib.Path(__file__).resolve().parents[1] / "floor" / "nccl_copy.py"
    out = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=_LIMIT_S, check=False)
    if out.returncode == 77:
        return None
    out.check_returncode()
    return json.loads(out.stdout.splitlines()[-1])


def raw_ucx(**environment):
    """Seconds of transfers by a program written on ucp, or None where it was not built."""
    path = program("raw_ucx")
    if path is None:
        return None
    environment = {**os.environ, **environment}
    target = subprocess.Popen([path, "target", "127.0.0.1", "0"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        port = target.stdout.readline().split()[1]
        out = subprocess.run([path, "initiator", "127.0.0.1", port], stdout=subprocess.PIPE, text=True, env=environment, check=False,
                             timeout=_LIMIT_S)
    finally:
        target.kill()
        target.wait()
    if out.returncode != 0:
        raise RuntimeError("raw UCX failed; its message is above")
    return json.loads(out.stdout)
