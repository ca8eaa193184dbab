"""check_nixl_plugins.py: one line a backend, exit status, JSON."""
import json
import pathlib
import subprocess
import sys

import nixl
import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "check_nixl_plugins.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=100)


def test_text_names_every_backend_with_a_reason():
    done = run()
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line and not line.startswith(" ")}
    for name, about in nixl.plugin_report().items():
        assert name in lines
        if not about["available"]:
            assert "not available" in lines[name] and about["reason"] in lines[name]
    works = nixl.plugin_report()
    assert done.returncode == (0 if works["UCX"]["available"] and works["POSIX"]["available"] else 1), done.stdout
    assert done.stderr == ""


def test_json():
    report = json.loads(run("--json").stdout)
    for name, about in nixl.plugin_report().items():
        assert isinstance(report[name].pop("created"), bool)
        assert report[name].keys() == about.keys() and report[name]["params"] == about["params"]


@pytest.mark.parametrize("name,status", [("POSIX", 0), ("NOSUCH", 1)])
def test_one_backend(name, status):
    done = run("--backend", name)
    assert done.returncode == status and name in done.stdout


def test_environment_that_breaks_nothing(monkeypatch):
    monkeypatch.setenv("NIXL_PLUGIN_DIR", "/nonexistent")
    done = run("--backend", "POSIX")
    assert done.returncode == 0 and "NIXL_PLUGIN_DIR=/nonexistent" in done.stdout
