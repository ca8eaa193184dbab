"""Makes the shared test code importable from every folder of tests."""

import pathlib
import sys

import pytest

_tests = pathlib.Path(__file__).parent
sys.path[:0] = [str(_tests / "support"), str(_tests / "python")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Tells fixtures at their end, by `request.node.failed`, whether the test failed."""
    report = yield
    item.failed = getattr(item, "failed", False) or report.failed
    return report
