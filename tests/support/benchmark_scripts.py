"""Benchmark scripts as programs of their own."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # for `utils`

needs_nixl = pytest.mark.skipif(subprocess.run([sys.executable, "-c", "import nixl._native"], capture_output=True).returncode != 0,
                                reason="the nixl package is not built")


def start(script, *flags):
    return subprocess.Popen([sys.executable, ROOT / "benchmarks" / script, *map(str, flags)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=ROOT)


def run(script, *flags, limit_s=100):
    process = start(script, *flags)
    try:
        out, err = process.communicate(timeout=limit_s)
    finally:
        process.kill()
    return process.returncode, out, err
