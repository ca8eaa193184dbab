"""Figures with a must and a goal: the table of `./run bench agent` and its like, JSON and a plot of them."""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys


@dataclasses.dataclass
class Figure:
    """One measured figure. `ours`, `must`, `goal` and `beside` (neighbours of the same run) are in `unit`."""

    name: str
    ours: float
    unit: str
    must: float | None = None
    goal: float | None = None
    beside: dict = dataclasses.field(default_factory=dict)
    higher_is_better: bool = False
    note: str = ""

    @property
    def met(self):
        """Whether the must is met; None for a figure without one."""
        if self.must is None:
            return None
        return self.ours >= self.must if self.higher_is_better else self.ours <= self.must


def ratio(name, ours, baseline, baseline_name, must, goal=1.0, higher_is_better=True, note=""):
    """A figure that is a ratio of two times: how fast we are (1 = as fast) or, lower being better, how long we take."""
    value = baseline / ours if higher_is_better else ours / baseline
    shown = f"{1e3 * ours:.3f} ms, {baseline_name} {1e3 * baseline:.3f} ms" + (f"; {note}" if note else "")
    return Figure(name, value, f"of {baseline_name}", must, goal, {}, higher_is_better, shown)


def parse_arguments(description, extra=None):
    """--json FILE, --plot FILE, --only TEXT; `extra` adds a benchmark's own flags to the parser."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw ours against must and goal (PNG, SVG, ...)")
    parser.add_argument("--only", metavar="TEXT", default="", help="groups whose name contains TEXT")
    if extra:
        extra(parser)
    return parser.parse_args()


def _number(value):
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def report(title, figures, method, arguments):
    """Prints the table and `N of M musts met`, writes what was asked for. Returns the exit code: 0 if all are met."""
    rows = [("figure", "ours", "must", "goal", "unit", "", "beside")]
    for figure in figures:
        verdict = {None: "", True: "met", False: "MISSED"}[figure.met]
        beside = ", ".join(f"{name} {_number(value)}" for name, value in figure.beside.items())
        beside = "; ".join(text for text in (beside, figure.note) if text)
        rows.append((figure.name, _number(figure.ours), _number(figure.must), _number(figure.goal), figure.unit, verdict, beside))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"=== {title} ===")
    print(method)
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    judged = [figure.met for figure in figures if figure.met is not None]
    print(f"{sum(judged)} of {len(judged)} musts met")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(_document(title, figures, method), file, indent=1)
    if arguments.plot:
        _plot(title, figures, arguments.plot)
    return 0 if all(judged) else 1


def _document(title, figures, method):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    commit = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    judged = [figure.met for figure in figures if figure.met is not None]
    return {
        "title": title, "method": method, "argv": sys.argv, "host": platform.node(), "kernel": platform.release(),
        "cpus": os.cpu_count(), "git": commit.stdout.strip(), "musts": len(judged), "musts_met": sum(judged),
        "figures": [dataclasses.asdict(figure) | {"met": figure.met} for figure in figures],
    }


def _plot(title, figures, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    judged = [figure for figure in figures if figure.must]
    # Everything as "how many times worse than the must": 1 is the must, below is better.
    worse = [f.must / f.ours if f.higher_is_better else f.ours / f.must for f in judged]
    goals = [(f.must / f.goal if f.higher_is_better else f.goal / f.must) if f.goal else None for f in judged]
    height = 1 + 0.34 * len(judged)
    _, axis = plt.subplots(figsize=(9, height))
    positions = range(len(judged))
    axis.barh(positions, worse, color=["#4c9f70" if f.met else "#c8553d" for f in judged], height=0.6)
    axis.scatter([g for g in goals if g], [p for p, g in zip(positions, goals) if g], marker="|", s=160, color="black", label="goal")
    axis.axvline(1, color="black", linewidth=1, label="must")
    axis.set_xscale("log")
    axis.set_yticks(positions, [f.name for f in judged], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("relative to the must (left is better)")
    axis.set_title(title)
    axis.legend(loc="lower right", fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=130)
