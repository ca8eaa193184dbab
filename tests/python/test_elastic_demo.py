"""The demo as a user starts it, made short: it ends well, says what it found, and draws its picture."""

import pathlib
import re
import subprocess
import sys

DEMO = pathlib.Path(__file__).resolve().parents[2] / "examples" / "python" / "elastic_demo.py"


def test_the_demo_runs_to_its_end(tmp_path):
    picture = tmp_path / "demo.png"
    command = [sys.executable, str(DEMO), "--device", "cpu", "--ranks", "4", "--seconds", "1.5", "--picture", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"rank 1, noticed after \d+ ms", done.stdout), done.stdout
    assert re.search(r"[1-9][\d,]* tokens checked against the reference, 0 wrong", done.stdout)
    assert "cpu (asked for with --device)" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_wrong_arguments_are_refused():
    done = subprocess.run([sys.executable, str(DEMO), "--ranks", "3"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "4 to 16" in done.stderr
