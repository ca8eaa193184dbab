"""What a rank checks in every phase, and how it measures. Runs on the CPU and on GPUs."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

RANK_OFFSET = 128  # structured values are rank - 128, exact in bfloat16 for ranks below 385
SHARED = 0xFFFFFFFF


@dataclass(frozen=True)
class Setting:
    """One rank's view of a phase."""

    rank: int
    num_ranks: int  # rank bound of the layout
    num_experts: int
    num_tokens: int
    max_tokens: int
    hidden: int
    topk: int
    device: str
    seed: int


@dataclass(frozen=True)
class Configuration:
    structured: bool
    hook: bool
    fp8: bool
    round_scale: bool
    ue8m0: bool

    def __str__(self) -> str:
        return ", ".join(name for name, value in vars(self).items() if value) or "random"


def configurations(hidden: int) -> list[Configuration]:
    """All that make sense: scales only with FP8, packed ones only rounded and where the hidden size allows them."""
    listed = [Configuration(*choice) for choice in itertools.product((True, False), repeat=5)]
    return [
        one
        for one in listed
        if (one.fp8 or not one.round_scale) and (one.round_scale or not one.ue8m0) and (hidden % 512 == 0 or not one.ue8m0)
    ]


def calc_diff(x, y) -> float:
    x, y = x.double() + 1, y.double() + 1
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def require(condition, text: str) -> None:
    if not condition:
        raise AssertionError(text)


# --------------------------------------------------------------------------------------------------------------- inputs


@functools.lru_cache(maxsize=128)
def choices_of(setting: Setting, rank: int):
    """The expert ids of any rank's tokens; a few are skipped. Every rank can work them out for every other."""
    generator = torch.Generator(device="cpu").manual_seed(setting.seed * 1000 + rank)
    scores = torch.randn(
        (setting.num_tokens, setting.num_experts), generator=generator, dtype=torch.float32, device="cpu"
    )
    topk = min(setting.topk, setting.num_experts)
    ids = scores.topk(topk, dim=-1, sorted=True).indices
    skipped = torch.randint(0, setting.num_tokens * topk, (10,), generator=generator, device="cpu")
    ids.view(-1)[skipped] = -1
    return ids.to(setting.device)


def make_x(setting: Setting, structured: bool):
    shape = (setting.num_tokens, setting.hidden)
    if not structured:
        generator = torch.Generator(device="cpu").manual_seed(setting.seed * 1000 + setting.rank)
        x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * 0.1
        return x.to(device=setting.device, dtype=torch.bfloat16)
    x = torch.full(shape, setting.rank - RANK_OFFSET, dtype=torch.bfloat16, device=setting.device)
    x[:, -128:] = torch.arange(setting.num_tokens, device=setting.device).to(torch.bfloat16).view(-1, 1)
    return x


def dequantize(values, scales):
    """FP8 rows and their scales (float32, or packed exponents) -> bfloat16 rows."""
    if scales.dtype == torch.int32:
        shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=scales.device)
        exponents = (scales.unsqueeze(-1) >> shifts) & 255  # little endian: the lowest byte is the first group's
        scales = (exponents << 23).view(torch.float32).flatten(start_dim=-2)
    rows = values.to(torch.float32).view(*values.shape[:-1], -1, 128) * scales.unsqueeze(-1)
    return rows.view(values.shape).to(torch.bfloat16)


# --------------------------------------------------------------------------------------------------------------- checks


@dataclass
class Checked:
    """Runs the configurations on one buffer, and reads its masks."""

    buffer: object
    setting: Setting
    capacity: int

    def masked(self) -> list[int]:
        """Of every rank of the capacity: nonzero if masked."""
        status = torch.zeros(self.capacity, dtype=torch.int32, device=self.setting.device)
        self.buffer.query_mask_buffer(status)
        return status.tolist()

    def run(self, before_first_dispatch: Callable[[], None] | None = None) -> int:
        """All configurations; returns how many. Raises AssertionError with what differs and where."""
        number = 0
        for number, one in enumerate(configurations(self.setting.hidden)):
            for _ in range(number % 2 + 1):
                if before_first_dispatch:
                    before_first_dispatch()
                    before_first_dispatch = None
                try:
                    self._check(one)
                except AssertionError as error:
                    raise AssertionError(f"rank {self.setting.rank}, {one}: {error}") from None
        return number + 1

    def _check(self, one: Configuration) -> None:
        s = self.setting
        x, ids = make_x(s, one.structured), choices_of(s, s.rank)
        stats = torch.zeros(s.num_experts // s.num_ranks, dtype=torch.int32, device=s.device)
        recv_x, count, handle, event, hook = self.buffer.dispatch(
            x,
            ids,
            s.max_tokens,
            s.num_experts,
            use_fp8=one.fp8,
            round_scale=one.round_scale,
            use_ue8m0=one.ue8m0,
            cumulative_local_expert_recv_stats=stats,
            async_finish=not one.hook,
            return_recv_hook=one.hook,
        )
        hook() if one.hook else event.current_stream_wait()
        rows = dequantize(*recv_x) if one.fp8 else recv_x
        self._check_received(one, rows, count, stats, handle)
        self._check_combined(one, x, ids, rows, handle)

    def _check_received(self, one, rows, count, stats, handle) -> None:
        s = self.setting
        src_info, layout_range = handle[:2]
        masked = self.masked()
        everyone = torch.stack([choices_of(s, r) for r in range(s.num_ranks)])
        for local in range(count.numel()):
            expert = s.rank * count.numel() + local
            ranges = layout_range[local].tolist()
            n = int(count[local])
            require(int(stats[local]) == n, f"expert {local}: statistics {int(stats[local])}, count {n}")
            in_ranges = sum(value & SHARED for value in ranges)
            require(in_ranges == n, f"expert {local}: the ranges hold {in_ranges} rows, the count is {n}")
            chosen = [(everyone[r] == expert).sum().item() for r in range(s.num_ranks) if masked[r] == 0]
            require(sum(chosen) == n, f"expert {local}: {n} rows, {sum(chosen)} selections by ranks not masked")
            if one.structured and n:
                self._check_structured(one, rows[local, :n], src_info[local, :n], ranges, expert, masked, everyone)

    def _check_structured(self, one, rows, sources, ranges, expert, masked, everyone) -> None:
        values, indices = rows[:, :-128], rows[:, -128:]
        require(torch.equal(values.amin(dim=1), values.amax(dim=1)), "a row holds channels of different rows")
        if one.round_scale:
            difference = calc_diff(rows[:, -1], sources.view(-1))
            require(difference < 0.007, f"token indices differ by {difference}")
        else:
            off = (indices - sources.view(-1, 1) % self.setting.num_tokens).sum().item()
            require(off == 0, f"token indices are off by {off} in all")
            for rank, value in enumerate(ranges):
                begin, n = value >> 32, value & SHARED
                if masked[rank]:
                    continue
                wanted = (everyone[rank] == expert).sum().item()
                found = (values[:, 0] == rank - RANK_OFFSET).sum().item()
                inside = (values[begin : begin + n, 0] == rank - RANK_OFFSET).sum().item()
                require(found == n == wanted == inside, f"of rank {rank}: {wanted} sent, {n} told, {found} found")

    def _check_combined(self, one, x, ids, rows, handle) -> None:
        s = self.setting
        generator = torch.Generator(device="cpu").manual_seed(s.seed + s.rank)
        weights = torch.randn(ids.shape, generator=generator, dtype=torch.float32, device="cpu").to(s.device)
        for zero_copy in (False, True):
            if zero_copy:
                self.buffer.get_next_combine_buffer(handle)[:, :, :] = rows
            out = torch.empty_like(x)
            combined, event, hook = self.buffer.combine(
                rows,
                ids,
                weights,
                handle,
                zero_copy=zero_copy,
                async_finish=not one.hook,
                return_recv_hook=one.hook,
                out=out,
            )
            hook() if one.hook else event.current_stream_wait()
            masked = torch.tensor(self.masked(), dtype=torch.int32, device=s.device)
            owners = (ids // (s.num_experts // s.num_ranks)).clamp(min=0)
            counted = (ids >= 0) & (masked[owners] == 0)
            wanted = x.float() * (weights * counted).sum(dim=1).view(-1, 1)
            require(not torch.isnan(combined.float()).any(), "a combined token is not a number")
            difference = calc_diff(wanted, combined)
            bound = 9e-4 if one.fp8 else 1e-5
            require(difference < bound, f"combine (zero_copy={zero_copy}) differs by {difference}, bound {bound}")


# ---------------------------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class Measured:
    """Seconds of one call, and bytes of valid rows, scales included, that one rank sends in it."""

    dispatch_s: list
    combine_s: list
    dispatch_bytes: int
    combine_bytes: int

    def summary(self) -> dict:
        result = {}
        for name, seconds, size in (
            ("dispatch", self.dispatch_s, self.dispatch_bytes),
            ("combine", self.combine_s, self.combine_bytes),
        ):
            ordered = sorted(seconds)
            median = statistics.median(ordered)
            result[f"{name}_us_median"] = round(1e6 * median, 1)
            result[f"{name}_us_p99"] = round(1e6 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 1)
            result[f"{name}_bytes"] = size
            result[f"{name}_gb_per_s"] = round(size / median / 1e9, 3)
        return result


def measure(buffer, setting: Setting, warm_ups: int = 50, runs: int = 50) -> Measured:
    """FP8 dispatch and combine, `runs` timed calls each, on this rank's clock (CUDA: events around the calls)."""
    s = setting
    x, ids = make_x(s, False), choices_of(s, s.rank)
    weights = torch.ones(ids.shape, dtype=torch.float32, device=s.device)
    selections = int((ids >= 0).sum())
    rows = torch.zeros(
        (s.num_experts // s.num_ranks, s.num_ranks * s.max_tokens, s.hidden), dtype=torch.bfloat16, device=s.device
    )
    marks = []
    for _ in range(warm_ups + runs):
        mark = [_now(s.device)]
        _, _, handle, _, _ = buffer.dispatch(x, ids, s.max_tokens, s.num_experts, use_fp8=True)
        mark.append(_now(s.device))
        buffer.combine(rows, ids, weights, handle)
        mark.append(_now(s.device))
        marks.append(mark)
    if s.device == "cuda":
        torch.cuda.synchronize()
    marks = marks[warm_ups:]
    return Measured(
        dispatch_s=[_seconds(mark[0], mark[1]) for mark in marks],
        combine_s=[_seconds(mark[1], mark[2]) for mark in marks],
        dispatch_bytes=selections * (s.hidden + s.hidden // 128 * 4),
        combine_bytes=selections * s.hidden * 2,
    )


def _now(device: str):
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin, end) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def kernel_times(buffer, setting: Setting, runs: int = 30) -> dict:
    """Microseconds of kernel time a call, from the profiler, by the names `dispatch` and `combine`."""
    from torch.profiler import ProfilerActivity, profile

    measure(buffer, setting, 5, 5)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        measure(buffer, setting, 0, runs)
    times = {}
    for name in ("dispatch", "combine"):
        events = [event for event in profiler.key_averages() if f"::{name}" in event.key]
        times[f"{name}_kernel_us"] = round(sum(event.device_time_total for event in events) / runs, 1)
    return times
