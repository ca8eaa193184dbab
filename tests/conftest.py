"""Makes the shared test code importable from every folder of tests."""

import pathlib
import sys

_tests = pathlib.Path(__file__).parent
sys.path[:0] = [str(_tests / "support"), str(_tests / "python")]
