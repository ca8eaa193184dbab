#!/usr/bin/env python3
"""Table, JSON lines and plot of expert parallel on GPUs, from what the programs of one call wrote.

    python tests/gpu/ep_report.py FILE... [--json OUT.jsonl] [--plot OUT.png]

FILEs hold JSON lines of ep_cuda_bench and link_floor, and the text of ep_floor, in any order.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

# Pair times, us, hidden 7168, 32 experts a rank, top-k 8, FP8 dispatch, graph-replayed: released packages on 4 (2) H200 of one
# NVLink domain, driver 580.159, CUDA 13.0. NCCL moves the bytes only, without routing or sums.
PUBLISHED = {
    4: {
        "NIXL EP 1.4.1": {1: 26.4, 8: 27.4, 32: 40.7, 128: 88.4, 256: 161, 512: 306, 1024: 583},
        "NCCL 2.28, bytes only": {1: 22.6, 8: 28.7, 32: 47.4, 128: 101.5, 256: 161, 512: 274, 1024: 476},
    },
    2: {"NIXL EP 1.4.1": {1: 25.0, 32: 34.3, 128: 71.5}},
}
PROBE_LINE = re.compile(r"^T\s+(\d+)\s+E\s+(\d+)\s+k\s+(\d+)\s+G\s+(\d+)\s+pair\s+(\S+)\s+([\d.]+) us", re.MULTILINE)


class Probe(NamedTuple):
    """The quickest pair of a case of the probe, over its drafts and grids."""

    us: float
    draft: str
    grid: int


@dataclass
class Run:
    """What one call measured. `cases` by (ranks, name): the replayed and the kernel figures of a case."""

    cases: dict = field(default_factory=dict)
    methods: dict = field(default_factory=dict)
    probe: dict = field(default_factory=dict)  # (tokens, experts, top-k): Probe
    link: dict | None = None
    lines: list = field(default_factory=list)

    def read(self, text: str) -> None:
        for line in text.splitlines():
            if line.startswith("{"):
                self._take(json.loads(line))
        for tokens, experts, topk, grid, draft, us in PROBE_LINE.findall(text):
            key, pair = (int(tokens), int(experts), int(topk)), Probe(float(us), draft, int(grid))
            self.probe[key] = min(pair, self.probe.get(key, pair))

    def _take(self, line: dict) -> None:
        self.lines.append(line)
        kind = line.get("kind")
        if kind in ("replayed", "kernels"):
            self.cases.setdefault((line["ranks"], line["case"]), {})[kind] = line
        elif kind == "method":
            self.methods = {name: line[name] for name in ("replayed", "kernels")}
        elif kind == "link":
            self.link = line

    def floor_us(self, replayed: dict) -> float | None:
        """A hop and the bytes at the link's rate, for dispatch and for combine."""
        if self.link is None:
            return None
        total = replayed["dispatch_link_bytes"] + replayed["combine_link_bytes"]
        return 2 * self.link["hop_us"] + total / self.link["rate_gb_s"] * 1e-3

    def by_tokens(self, ranks: int) -> dict:
        """The cases that differ in tokens only: {tokens: case}."""
        rows = {}
        for (count, _), case in self.cases.items():
            line = case.get("replayed") or case["kernels"]
            if count == ranks and (line["hidden"], line["topk"], line["payload"], line["experts"]) == (7168, 8, 1, 32 * ranks):
                rows[line["tokens"]] = case
        return dict(sorted(rows.items()))


def number(value, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(run: Run, ranks: int) -> str:
    heads = ["case", "kernel d / c", "replayed d / c", "pair", "must (pair)", "send / receive d", "send / receive c", "link floor",
             "probe", "memory MB"]
    rows = []
    for (count, name), case in run.cases.items():
        if count != ranks:
            continue
        replayed, kernels = case.get("replayed", {}), case.get("kernels", {})
        line = replayed or kernels
        must = replayed.get("pair_must_us")
        verdict = "" if must is None else f"{must:g} {'met' if replayed['pair_us'] <= must else 'missed'}"
        probe = run.probe.get((line["tokens"], line["experts"], line["topk"])) if line["payload"] == 1 and line["hidden"] == 7168 else None

        def pair(where, first, second):
            return f"{number(where.get(first))} / {number(where.get(second))}"

        rows.append([
            name, pair(kernels, "dispatch_us", "combine_us"), pair(replayed, "dispatch_us", "combine_us"),
            number(replayed.get("pair_us")), verdict, pair(kernels, "dispatch_send_us", "dispatch_receive_us"),
            pair(kernels, "combine_send_us", "combine_receive_us"), number(run.floor_us(replayed) if replayed else None),
            f"{number(probe.us)} {probe.draft}" if probe else "-", number(replayed.get("memory_mb"), 0),
        ])
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def curves(run: Run, ranks: int) -> dict[str, dict[int, float]]:
    """{name: {tokens: us}} of pairs."""
    cases = run.by_tokens(ranks)
    found = {
        "ours, replayed pair": {n: case["replayed"]["pair_us"] for n, case in cases.items() if "replayed" in case},
        "ours, kernels of both": {
            n: case["kernels"]["dispatch_us"] + case["kernels"]["combine_us"] for n, case in cases.items() if "kernels" in case
        },
        "probe": {tokens: pair.us for (tokens, experts, topk), pair in sorted(run.probe.items()) if (experts, topk) == (32 * ranks, 8)},
        "link's floor": {n: run.floor_us(case["replayed"]) for n, case in cases.items() if run.link and "replayed" in case},
        **PUBLISHED.get(ranks, {}),
    }
    return {name: curve for name, curve in found.items() if curve}


STYLES = {
    "ours, replayed pair": {"color": "#1b5e9e", "marker": "o", "linewidth": 2.4},
    "ours, kernels of both": {"color": "#6aa7dc", "marker": ".", "linewidth": 1.4},
    "probe": {"color": "#2e8b57", "marker": "s", "linewidth": 1.4},
    "link's floor": {"color": "#555555", "linestyle": "--", "linewidth": 1.2},
    "NIXL EP 1.4.1": {"color": "#c0562f", "marker": "^", "linewidth": 1.4},
    "NCCL 2.28, bytes only": {"color": "#b59a3a", "marker": "v", "linewidth": 1.4},
}


def plot(run: Run, ranks: int, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.2), dpi=150)
    for name, curve in curves(run, ranks).items():
        axes.plot(list(curve), list(curve.values()), label=name, markersize=5, **STYLES[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    tokens = sorted(run.by_tokens(ranks))
    axes.set_xticks(tokens, [str(n) for n in tokens])
    ticks = [us for us in (5, 10, 20, 50, 100, 200, 500, 1000) if axes.get_ylim()[0] <= us <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [str(us) for us in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens a rank")
    axes.set_ylabel("dispatch + combine, us")
    axes.set_title(f"{ranks} GPUs, hidden 7168, {32 * ranks} experts, top-k 8, FP8 dispatch", loc="left", fontsize=11)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--json", type=pathlib.Path, help="every line of the call, in one file")
    parser.add_argument("--plot", type=pathlib.Path, help="latency over tokens, of the largest number of ranks")
    options = parser.parse_args(arguments)
    run = Run()
    for file in options.files:
        if file.exists():
            run.read(file.read_text())
        else:
            print(f"{file} is missing: that program did not run", file=sys.stderr)
    if not run.cases:
        print("no case was measured: there is nothing to report", file=sys.stderr)
        return 1
    counts = sorted({ranks for ranks, _ in run.cases}, reverse=True)
    for name, method in run.methods.items():
        print(f"{name}: {method}.")
    if run.link:
        print(f"link: {run.link['stores_gb_s']:.0f} GB/s a GPU by plain stores, {run.link['engines_gb_s']:.0f} through copy engines, all "
              f"to all; a hop {run.link['hop_us']:.2f} us.")
    for ranks in counts:
        print(f"\n{ranks} ranks, us\n\n{table(run, ranks)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        probe = [
            {"kind": "probe", "tokens": t, "experts": e, "topk": k, "pair_us": pair.us, "draft": pair.draft, "grid": pair.grid}
            for (t, e, k), pair in run.probe.items()
        ]
        options.json.write_text("".join(json.dumps(line) + "\n" for line in run.lines + probe))
    if options.plot:
        plot(run, counts[0], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
