"""docs/settings.md names every environment variable that is read and every parameter of a backend, and no others."""
import pathlib
import re

import nixl

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "settings.md").read_text()
NO_VARIABLES = re.compile(r"NIXL_(ERR|SUCCESS|READ|WRITE|IN_PROG|INIT_AGENT|THREAD_SYNC|COST_|BACKEND_PLUGIN)")


def variables_of(folder, pattern):
    """Names of our variables among the string literals of a folder, tests left out."""
    found = set()
    for file in (ROOT / folder).rglob(pattern):
        if not file.stem.endswith(("_test", "_bench")):
            found |= set(re.findall(r'"(NIXL_[A-Z0-9_]+)"', file.read_text()))
    return {name for name in found if not NO_VARIABLES.match(name)}


def test_every_variable_is_named_and_no_other():
    read = variables_of("src", "*.cc") | variables_of("src", "*.h") | variables_of("python", "*.py")
    assert read - {name for name in re.findall(r"NIXL_[A-Z0-9_]+", PAGE)} == set()
    assert {name for name in re.findall(r"NIXL_[A-Z0-9_]+", PAGE)} - read == set()


def test_every_parameter_is_named():
    missing = {(backend, name) for backend, about in nixl.plugin_report().items() for name in about["params"]
               if f"`{name}`" not in PAGE and not about["reason"].startswith("not in this build")}
    assert missing == set()
