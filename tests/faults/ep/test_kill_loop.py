"""The loop of kills that the GPU run repeats hundreds of times, in short: CPU ranks, or GPU ranks where NIXL_EP_TEST_DEVICE says so."""

import json
import pathlib
import subprocess
import sys

import pytest
from ep_fixtures import ALL, num_gpus

LOOP = pathlib.Path(__file__).with_name("kill_loop.py")
KILLS = 60 if ALL else 4


@pytest.mark.timeout(2000 if ALL else 600)
def test_kill_loop_goes_on_where_it_stopped(device, tmp_path):
    if device == "cuda" and num_gpus() < 4:
        pytest.skip(f"4 ranks need 4 GPUs, there are {num_gpus()}")
    state = tmp_path / "state.json"
    for tried in (KILLS - 1, KILLS):
        command = [sys.executable, str(LOOP), "--device", device, "--timeout-ms", "800", "--spares", "1", "--state", str(state)]
        command += ["--kills", str(tried), "--seconds", "1700" if ALL else "250"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800 if ALL else 280)
        assert done.returncode == 0, done.stdout + done.stderr
        told = json.loads(done.stdout)
        assert told["tried"] == told["survived"] == tried, told
    assert sum(told["signals"].values()) == KILLS and told["stalled_ms"]["worst"] > 0
