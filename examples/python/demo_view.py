"""How the demo shows itself: a live block (plain lines where there is no terminal), the final table, the picture."""

from __future__ import annotations

import sys
import time

import numpy as np
from demo_rank import BIN_S

REFRESH_S = 0.2
LINE_EVERY_S = 2.0  # without a terminal
BAR = 28


class LiveView:
    """Redraws one block in place on a terminal; elsewhere prints a line for every event and every two seconds."""

    def __init__(self, demo):
        self.demo = demo
        self.live = sys.stdout.isatty()
        self.drawn = 0  # lines of the block on the screen
        self.last = 0.0
        self.phase = None
        print(f"nixl_ep elastic demo on {demo.device} ({demo.why})")
        print(f"{demo.options.ranks} rank processes at most, {demo.options.tokens} tokens of {demo.options.hidden} channels each", flush=True)

    def enter(self, number: int, phase) -> None:
        self.number, self.phase = number, phase
        if not self.live:
            print(f"[{self._age():5.1f} s] phase {number + 1}/{len(self.demo.plan)}: {phase.title}", flush=True)
        self.refresh(force=True)

    def refresh(self, force: bool = False) -> None:
        now = time.monotonic()
        if self.phase is None or (not force and now - self.last < (REFRESH_S if self.live else LINE_EVERY_S)):
            return
        self.last = now
        if self.live:
            self._draw(self._block())
        elif not force:
            checked, wrong = self.demo.board.totals()
            rate = sum(self._rate(rank) for rank in range(self.demo.options.ranks))
            print(
                f"[{self._age():5.1f} s]   {len(self._alive())} ranks, {rate:,.0f} tokens/s, "
                f"{checked:,} tokens checked, {wrong} wrong",
                flush=True,
            )

    def close(self) -> None:
        if self.live:
            self.refresh(force=True)
        self.phase = None

    def _age(self) -> float:
        return time.monotonic() - self.demo.board.began

    def _alive(self) -> list:
        dead = self.phase.killed if self.phase.killed_at else None
        return [rank for rank in self.phase.present if rank != dead]

    def _rate(self, rank: int) -> float:
        """Mean over the last second that is complete."""
        end = int(self._age() / BIN_S)
        return float(self.demo.board.rates(rank)[max(0, end - 10) : end].mean()) if end else 0.0

    def _block(self) -> list[str]:
        demo, alive = self.demo, self._alive()
        rates = [self._rate(rank) for rank in range(demo.options.ranks)]
        top = max([*rates, 1.0])
        lines = [f"\033[1mphase {self.number + 1}/{len(demo.plan)}  {self.phase.title}\033[0m   {self._age():5.1f} s"]
        for rank, rate in enumerate(rates):
            if rank in alive:
                lines.append(f"  rank {rank}  \033[32m{'█' * round(BAR * rate / top):<{BAR}}\033[0m {rate:>9,.0f} tokens/s")
            elif self.phase.killed == rank:
                lines.append(f"  rank {rank}  \033[31m{'killed':<{BAR}}\033[0m")
            else:
                lines.append(f"  rank {rank}  \033[2m{'not here':<{BAR}}\033[0m")
        checked, wrong = demo.board.totals()
        lines.append(f"  {len(alive)} ranks, {sum(rates):,.0f} tokens/s, {checked:,} tokens checked, {wrong} wrong")
        return lines

    def _draw(self, lines: list[str]) -> None:
        up = f"\033[{self.drawn}A" if self.drawn else ""
        sys.stdout.write(up + "".join(f"\033[2K{line}\n" for line in lines))
        sys.stdout.flush()
        self.drawn = len(lines)


def table(demo) -> str:
    """One row a phase; latencies over all operations of all ranks, GB/s of payload one rank sends while it sends."""
    heads = f"{'phase':<22}{'ranks':>6}{'change':>9}{'dispatch ms':>14}{'GB/s':>7}{'combine ms':>14}{'GB/s':>7}{'tokens':>10}{'wrong':>7}  faults"
    lines = ["", heads, f"{'':<28}{'ms':>9}{'median / p99':>14}{'':>7}{'median / p99':>14}", "-" * 110]
    for phase in demo.plan:
        records = list(phase.records.values())
        if not records:
            lines.append(f"{phase.title:<22}  did not run")
            continue
        cells = f"{phase.title:<22}{len(phase.present):>6}{phase.change_ms:>9.0f}"
        for name in ("dispatch", "combine"):
            median, p99 = demo.latencies(phase, f"{name}_s")
            sent = sum(getattr(record, f"{name}_bytes") for record in records)
            seconds = sum(sum(getattr(record, f"{name}_s")) for record in records)
            cells += f"{f'{median:.2f} / {p99:.2f}':>14}{sent / seconds / 1e9 if seconds else 0:>7.2f}"
        faults = "-"
        if phase.killed is not None:
            told = phase.detection_ms()
            faults = f"rank {phase.killed}, noticed after {told:.0f} ms" if told else f"rank {phase.killed}, not noticed"
        tokens, wrong = sum(r.tokens for r in records), sum(r.wrong for r in records)
        lines.append(f"{cells}{tokens:>10,}{wrong:>7}  {faults}")
    checked, wrong = demo.board.totals()
    lines.append(f"\n{checked:,} tokens checked against the reference, {wrong} wrong; timeout {demo_timeout_ms()} ms; {demo.device} ({demo.why})")
    return "\n".join(lines)


def demo_timeout_ms() -> int:
    from elastic_demo import TIMEOUT_MS

    return TIMEOUT_MS


# -------------------------------------------------------------------------------------------------------------- picture

MARKS = {
    "join": ("^", "#1a7f37", "joins"),
    "leave": ("v", "#57606a", "leaves"),
    "kill": ("X", "#cf222e", "SIGKILL"),
    "return": ("*", "#8250df", "returns"),
}
FILLS = ["#4c78a8", "#72b7b2", "#e45756", "#54a24b", "#f2a93b", "#b279a2", "#9d755d", "#6b8ba4"]


def picture(demo, path: str) -> None:
    """A lane of throughput for every rank over one time axis, the sum above them, comings and goings marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ranks, start = demo.options.ranks, demo.board.began
    end = demo.plan[-1].ended - start
    bins = int(end / BIN_S) + 1
    times = (np.arange(bins) + 0.5) * BIN_S
    rates = np.array([smooth(demo.board.rates(rank)[:bins]) for rank in range(ranks)])
    figure, axes = plt.subplots(
        ranks + 1, 1, sharex=True, figsize=(13, 2.6 + 0.95 * ranks), height_ratios=[2.2] + [1] * ranks, layout="constrained"
    )
    shade_phases(demo, axes, start, end)
    axes[0].fill_between(times, rates.sum(axis=0) / 1000, color="#24292f", alpha=0.85, linewidth=0)
    axes[0].set_ylim(0, rates.sum(axis=0).max() / 1000 * 1.1)
    name_lane(axes[0], "all ranks", "thousand\ntokens / s")
    top = rates.max() * 1.35
    for rank, lane in enumerate(axes[1:]):
        lane.fill_between(times, rates[rank], color=FILLS[rank % len(FILLS)], linewidth=0)
        lane.set_ylim(0, top)
        lane.set_yticks([])
        name_lane(lane, f"rank {rank}")
    draw_events(demo, axes, start, top)
    axes[-1].set_xlim(demo.events[0][0] - start - 0.5, end)  # starting the first processes is left out
    axes[-1].set_xlabel("seconds since the demo began; in the gaps members change and the next right answers are worked out")
    checked, wrong = demo.board.totals()
    told = next((phase.detection_ms() for phase in demo.plan if phase.killed is not None), None)
    figure.suptitle(
        f"Expert-parallel ranks come, die and return: {checked:,} tokens checked, {wrong} wrong"
        + (f"; the death noticed after {told:.0f} ms" if told else ""),
        fontsize=14,
        fontweight="bold",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def smooth(values):
    """Mean of three bins, but nothing where there was nothing."""
    return np.convolve(values, np.ones(3) / 3, mode="same") * (values > 0)


def shade_phases(demo, axes, start: float, end: float) -> None:
    edges = [phase.began - start for phase in demo.plan] + [end]
    edges[0] = demo.events[0][0] - start - 0.5
    for number, phase in enumerate(demo.plan):
        for lane in axes:
            lane.axvspan(edges[number], edges[number + 1], color="#f6f8fa" if number % 2 else "#ffffff", zorder=-2)
            if number:
                lane.axvline(edges[number], color="#d0d7de", linewidth=0.8, zorder=-1)
        axes[0].text(
            (edges[number] + edges[number + 1]) / 2, 1.03, phase.title, transform=axes[0].get_xaxis_transform(),
            ha="center", va="bottom", fontsize=10.5, color="#24292f",
        )  # fmt: skip


def name_lane(lane, name: str, unit: str = "") -> None:
    lane.set_ylabel(f"{name}\n{unit}" if unit else name, rotation=0, ha="right", va="center", fontsize=10)
    for side in ("top", "right", "left"):
        lane.spines[side].set_visible(False)
    lane.spines["bottom"].set_color("#d0d7de")
    lane.tick_params(length=0, labelsize=9)


def draw_events(demo, axes, start: float, top: float) -> None:
    for when, rank, what in demo.events:
        marker, color, word = MARKS[what]
        lane, at = axes[rank + 1], when - start
        if what == "kill":
            for each in axes:
                each.axvline(at, color=color, linewidth=1.2, linestyle=(0, (4, 2)))
        lane.plot(at, top * 0.62, marker=marker, color=color, markersize=15 if what == "return" else 11, clip_on=False, zorder=5)
        left = what in ("leave",)
        lane.annotate(
            word, (at, top * 0.62), xytext=(-12 if left else 12, 0), textcoords="offset points", va="center",
            ha="right" if left else "left", fontsize=10, color=color, fontweight="bold", zorder=6,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )  # fmt: skip
