"""Backend Mooncake between two processes: over the engine of the public Python package, and over a library that stands in for it."""
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import sysconfig

import pytest
from mooncake_pair import SCENARIOS

import nixl

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(nixl.__file__).absolute().parents[2]
PACKAGE, VERSION = "mooncake-transfer-engine-non-cuda", "0.3.13.post1"
ALL = os.environ.get("NIXL_TEST_ALL") == "1"

pytestmark = pytest.mark.timeout(150)


def test_library(name):
    path = BUILD / name
    if not path.exists():
        pytest.skip(f"{path} is not there: tests run from a build folder have it")
    return str(path)


test_library.__test__ = False


def environment(engine):
    env = dict(os.environ, NIXL_MOONCAKE_IP_ADDR="127.0.0.1", NIXL_LOG_LEVEL="WARN")
    if engine == "stand-in":
        env["NIXL_MOONCAKE_LIBRARY"] = test_library("src/backends/mooncake/libnixl_stand_in_mooncake.so")
        return env
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"Mooncake's engine is not here: pip install {PACKAGE}=={VERSION}")
    if version != VERSION:
        pytest.skip(f"{PACKAGE} is {version}; the tests can call the engine of {VERSION}")
    module = pathlib.Path(importlib.util.find_spec("mooncake").origin).parent / "engine.so"
    env["NIXL_MOONCAKE_LIBRARY"] = test_library("tests/conformance/libnixl_mooncake_wheel.so")
    env["NIXL_TEST_MOONCAKE_MODULE"] = str(module)
    env["NIXL_TEST_LIBPYTHON"] = str(pathlib.Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME")))
    return env


@pytest.fixture(scope="module", params=["package", "stand-in"])
def outcomes(request):
    env = environment(request.param)
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "support" / "mooncake_pair.py")], env=env, timeout=140,
                          capture_output=True, text=True)
    lines = [json.loads(line[2:]) for line in done.stdout.splitlines() if line.startswith("= ")]
    return dict(lines) if lines else {name: done.stderr for name in SCENARIOS}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes(outcomes, scenario):
    assert outcomes.get(scenario, "not reached") == "ok", outcomes


# Every engine of the package takes a second to end, so the rest of the suite is left to the long run.
@pytest.mark.parametrize("item", [""] if ALL else ["reposts", "cancel_leaves", "messages_arrive", "attached_message", "lost_peer"])
def test_suite_over_the_package(item):
    env = environment("package")
    if not os.path.exists(env["NIXL_TEST_LIBPYTHON"]):
        pytest.skip(f"{env['NIXL_TEST_LIBPYTHON']} is not there: this interpreter has no shared library")
    done = subprocess.run([test_library("tests/conformance/mooncake_suite"), item], env=env, timeout=140, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:].decode(errors="replace")


def test_the_reason_where_the_engine_is_missing():
    env = dict(os.environ, NIXL_MOONCAKE_LIBRARY="/nonexistent/libtransfer_engine.so", PYTHONPATH=os.pathsep.join(sys.path))
    code = """if True:
        import nixl
        from nixl._api import nixl_agent, nixl_agent_config
        one = nixl_agent("one", nixl_agent_config(backends=[]))
        assert "Mooncake" not in one.get_plugin_list()
        try:
            one.create_backend("MOONCAKE")
        except nixl.nixlNotFoundError as error:
            print(error.reason)
    """
    out = subprocess.run([sys.executable, "-c", code], env=env, timeout=60, capture_output=True, text=True, check=True).stdout
    for part in ("libtransfer_engine.so", "/nonexistent", "No such file", "NIXL_MOONCAKE_LIBRARY"):
        assert part in out, out
