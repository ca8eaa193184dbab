"""./run test: every check that can run on this machine, then the list of skips with their reasons.

Order: layers, C++ tests (ctest), Python tests (pytest). --all adds the sanitizer builds and the long variants of the tests.
Ends with `N passed, N failed, N skipped`; exit code 0 only if nothing failed and something ran.
"""
import argparse
import collections
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEP_LIMIT_S = 3600
LONG_STEP_LIMIT_S = 3 * 3600  # of the long variants


class Tally:
    def __init__(self):
        self.passed, self.failed, self.skipped = 0, [], collections.defaultdict(list)

    def read_junit(self, path, suite):
        if not path.exists():
            self.failed.append(f"{suite}: left no report")
            return
        for case in xml.parse(path).getroot().iter("testcase"):
            name = f"{suite}: {case.get('classname', '')}.{case.get('name')}"
            skip = case.find("skipped")
            if skip is not None:
                self.skipped[skip_reason(case, skip)].append(name)
            elif case.find("failure") is not None or case.find("error") is not None:
                self.failed.append(name)
            else:
                self.passed += 1


def skip_reason(case, skip):
    """pytest keeps the reason in the element; a C++ test prints `SKIP: reason` and exits 77."""
    for line in (case.findtext("system-out") or "").splitlines():
        if line.startswith("SKIP: "):
            return line[len("SKIP: "):]
    return (skip.get("message") or skip.text or "no reason given").strip()


def run(command, extra_env=None, limit_s=STEP_LIMIT_S):
    env = {**os.environ, **(extra_env or {})}
    try:
        return subprocess.run(command, cwd=ROOT, env=env, timeout=limit_s, stdin=subprocess.DEVNULL).returncode
    except subprocess.TimeoutExpired:
        print(f"{command[0]} ran past {limit_s} s and was stopped", flush=True)
        return 124


def step(title):
    print(f"\n=== {title} ===", flush=True)


def ctest(preset, tally, reports):
    report = reports / f"ctest-{preset}.xml"
    code = run(["ctest", "--test-dir", f"build/{preset}", "--output-on-failure", "--output-junit", str(report), "-j2"])
    before = len(tally.failed)
    tally.read_junit(report, f"C++ {preset}")
    if code != 0 and len(tally.failed) == before:
        tally.failed.append(f"C++ {preset}: ctest ended with {code}")


def sanitizer(preset, tally, reports):
    step(f"C++ tests under the {preset} preset")
    if run(["cmake", "--preset", preset]) or run(["cmake", "--build", f"build/{preset}"]):
        tally.failed.append(f"C++ {preset}: does not build")
        return
    ctest(preset, tally, reports)


def python_tests(tally, reports, arguments, everything):
    report = reports / "pytest.xml"
    # A test file's workers and torch each like every core; one thread apiece keeps many ranks on few cores moving.
    env = {"OMP_NUM_THREADS": "1", "NIXL_TEST_ALL": "1" if everything else ""}
    code = run([sys.executable, "-m", "pytest", "-q", "-x" if "-x" in arguments else "-ra", "--durations=8",
                f"--junitxml={report}", *[a for a in arguments if a != "-x"]], env, LONG_STEP_LIMIT_S if everything else STEP_LIMIT_S)
    before = len(tally.failed)
    tally.read_junit(report, "Python")
    if code not in (0, 1) and len(tally.failed) == before:
        tally.failed.append(f"Python: pytest ended with {code}")


def main():
    parser = argparse.ArgumentParser(prog="./run test", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="also the sanitizers and the long variants")
    parser.add_argument("pytest", nargs="*", help="passed to pytest, e.g. tests/conformance -k dispatch")
    options, rest = parser.parse_known_args()
    tally, start = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        reports = pathlib.Path(folder)
        selected = options.pytest + rest
        if not selected:
            step("Layers")
            if run([sys.executable, "tools/check_layers"]):
                tally.failed.append("tools/check_layers")
            else:
                tally.passed += 1
            step("C++ tests")
            ctest("dev", tally, reports)
        step("Python tests")
        python_tests(tally, reports, selected or ["tests"], options.all)
        if options.all:
            for preset in ("asan", "tsan"):
                sanitizer(preset, tally, reports)
    print(f"\n=== Result after {time.monotonic() - start:.0f} s ===")
    for name in tally.failed:
        print("FAILED ", name)
    for reason, names in sorted(tally.skipped.items()):
        print(f"skipped {len(names):4d}  {reason}   (first: {names[0]})")
    skips = sum(len(names) for names in tally.skipped.values())
    print(f"{tally.passed} passed, {len(tally.failed)} failed, {skips} skipped")
    return 1 if tally.failed or not tally.passed else 0


if __name__ == "__main__":
    sys.exit(main())
