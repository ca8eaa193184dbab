"""The installed C++ package: headers alone, find_package, pkg-config, examples, plug-ins built outside the tree."""
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import nixl
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(nixl.__file__).absolute().parents[2]


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=280, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    if not (BUILD / "CMakeCache.txt").exists():
        pytest.skip(f"{BUILD} is no build folder to install from")
    folder = tmp_path_factory.mktemp("prefix")
    for component in ("runtime", "development"):
        run("cmake", "--install", BUILD, "--prefix", folder, "--component", component)
    return folder


@pytest.fixture(scope="module")
def library(prefix):
    return next(prefix.rglob("libnixl.so")).parent


@pytest.fixture(scope="module")
def examples(prefix, tmp_path_factory):
    build = tmp_path_factory.mktemp("examples")
    run("cmake", "-S", ROOT / "examples/cpp", "-B", build, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build, "-j2")
    return build


@pytest.mark.parametrize("backend", ["UCX", "LOOPBACK"])
def test_transfer_example(examples, backend):
    if backend == "UCX" and not nixl.plugin_report()["UCX"]["available"]:
        pytest.skip(nixl.plugin_report()["UCX"]["reason"])
    out = run(examples / "transfer", backend, env=dict(os.environ, NIXL_LOOPBACK="y"))
    assert out.strip() == f"{backend}: ok"


def test_storage_example(examples):
    assert run(examples / "storage").strip() == "ok"


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_headers_alone(prefix, compiler, standard, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} here")
    for header in sorted(path.name for path in (prefix / "include/nixl").iterdir()):
        for first in ("", "#include <cstdio>\n"):
            source = tmp_path / "alone.cc"
            source.write_text(f"{first}#include <nixl/{header}>\n")
            run(compiler, f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{prefix}/include", source)


def test_pkg_config(prefix, library, tmp_path):
    if not shutil.which("pkg-config"):
        pytest.skip("no pkg-config here")
    env = dict(os.environ, PKG_CONFIG_PATH=str(library / "pkgconfig"))
    flags = run("pkg-config", "--cflags", "--libs", "nixl", env=env).split()
    program = tmp_path / "storage"
    run("g++", "-std=c++17", ROOT / "examples/cpp/storage.cc", "-o", program, *flags)
    assert run(program, env=dict(os.environ, LD_LIBRARY_PATH=str(library))).strip() == "ok"


def test_library_needs_nothing_of_vendors(library):
    needed = run("readelf", "-d", library / "libnixl.so")
    assert "SONAME" in needed and "libnixl.so.1" in needed
    for word in ("python", "torch", "cuda", "ucp", "ucs", "curl", "fabric"):
        assert not any("NEEDED" in line and word in line for line in needed.splitlines()), word


def with_plugin(folder, code, **env):
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=100,
                         env=dict(os.environ, NIXL_PLUGIN_DIR=str(folder), **env))
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout + out.stderr


def test_plugin_from_outside(examples):
    with_plugin(examples, """
        import nixl, numpy as np
        a = nixl.nixl_agent("a", nixl.nixl_agent_config(backends=["COPY"]))
        assert "COPY" in a.get_plugin_list() and a.get_plugin_params("COPY") == {"limit_bytes": "0"}
        m = np.arange(200, dtype=np.uint8)
        a.register_memory([m])
        h = a.initialize_xfer("WRITE", a.get_xfer_descs([m[:100]]), a.get_xfer_descs([m[100:]]), "a", b"copied")
        assert a.transfer(h) == "DONE" and (m[:100] == m[100:]).all() and a.query_xfer_backend(h) == "COPY"
        assert a.get_new_notifs() == {"a": [b"copied"]}
        b = nixl.nixl_agent("b", nixl.nixl_agent_config(backends=["COPY"], backend_params={"COPY": {"limit_bytes": 10}}))
        try:
            b.register_memory([m])
        except nixl.nixlBackendError as error:
            assert "limit_bytes=10" in str(error)
        else:
            raise SystemExit("the plug-in's exception did not arrive")
        """)


@pytest.mark.parametrize("source,reason", [
    ('extern "C" int something_else() { return 0; }', "nixl_backend_plugin"),
    ('#include <nixl/backend.h>\nextern "C" NIXL_EXPORT const nixl::PluginDescription* nixl_backend_plugin() {\n'
     'static const nixl::PluginDescription d{77, "another compiler"}; return &d; }', "API 77, 'another compiler'"),
    ('extern int missing(); extern "C" int use() { return missing(); }', "undefined symbol"),
])
def test_broken_plugins_are_refused_with_the_reason(prefix, tmp_path, source, reason):
    (tmp_path / "bad.cc").write_text(source)
    run("g++", "-std=c++17", "-shared", "-fPIC", f"-I{prefix}/include", tmp_path / "bad.cc", "-o", tmp_path / "libplugin_BAD.so")
    out = with_plugin(tmp_path, f"""
        import nixl
        a = nixl.nixl_agent("a", nixl.nixl_agent_config(backends=["BAD", "POSIX"]))
        assert list(a.backends) == ["POSIX"]
        assert {reason!r} in nixl.plugin_report()["BAD"]["reason"], nixl.plugin_report()["BAD"]
        """)
    assert reason in out
