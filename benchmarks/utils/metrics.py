"""Figures of one measured size, and the three ways they are printed: text, JSON, CSV."""

import csv
import ctypes
import dataclasses
import io
import json
import os
import platform
import resource
import statistics
import threading

from utils.config import format_size

ROW_KEYS = (
    "buffer_size_bytes", "batch_size", "iterations", "bandwidth_gbps_decimal", "latency_us_mean", "latency_us_p50",
    "latency_us_p95", "latency_us_p99", "iops", "cpu_percent", "gpu_percent", "consistency", "prep_us_mean",
    "post_us_mean", "tx_us_mean",
)


def percentile(ordered, percent):
    """Linear interpolation between the neighbours in an ascending list."""
    if not ordered:
        raise ValueError("no samples")
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclasses.dataclass
class Samples:
    """What the timed loop of one size leaves: nanoseconds a transfer, wall and CPU seconds, GPU percent."""

    latency_ns: list
    prep_ns: list
    post_ns: list
    wall_s: float
    cpu_s: float
    gpu_percent: float | None = None


def row(size, batch, samples, consistency):
    """The report's row of one size; see ROW_KEYS. `bandwidth_gbps_decimal` counts 1e9 bytes/s."""
    ordered = sorted(value / 1e3 for value in samples.latency_ns)
    transfers = len(ordered)
    post = statistics.fmean(samples.post_ns) / 1e3 if samples.post_ns else None
    mean = statistics.fmean(ordered)
    return {
        "buffer_size_bytes": size, "batch_size": batch, "iterations": transfers,
        "bandwidth_gbps_decimal": size * batch * transfers / samples.wall_s / 1e9,
        "latency_us_mean": mean, "latency_us_p50": percentile(ordered, 50),
        "latency_us_p95": percentile(ordered, 95), "latency_us_p99": percentile(ordered, 99),
        "iops": transfers * batch / samples.wall_s, "cpu_percent": 100 * samples.cpu_s / samples.wall_s,
        "gpu_percent": samples.gpu_percent, "consistency": consistency,
        "prep_us_mean": statistics.fmean(samples.prep_ns) / 1e3 if samples.prep_ns else None,
        "post_us_mean": post, "tx_us_mean": None if post is None else max(0.0, mean - post),
        "wall_s": samples.wall_s,
        "tails_us": {name: percentile(sorted(values), 99) / 1e3 for name, values in (
            ("prep", samples.prep_ns), ("post", samples.post_ns),
            ("tx", [whole - post for whole, post in zip(samples.latency_ns, samples.post_ns)])) if values},
    }


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class GpuMeter:
    """Mean utilisation of one GPU from NVML while it is open, sampled every 20 ms; `percent` stays None without NVML."""

    class _Utilization(ctypes.Structure):
        _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]

    def __init__(self, gpu_id):
        self.percent, self.reason = None, ""
        self._gpu_id, self._stop, self._thread = gpu_id, threading.Event(), None

    def __enter__(self):
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            self.reason = f"NVML: {error}"
            return self
        handle = ctypes.c_void_p()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(self._gpu_id, ctypes.byref(handle)):
            self.reason = f"NVML: no GPU {self._gpu_id}"
            return self
        self._thread = threading.Thread(target=self._sample, args=(nvml, handle), daemon=True)
        self._thread.start()
        return self

    def _sample(self, nvml, handle):
        values, use = [], self._Utilization()
        while not self._stop.wait(0.02):
            if nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(use)) == 0:
                values.append(use.gpu)
        self.percent = statistics.fmean(values) if values else None
        self.reason = "" if values else "the timed loop ended before NVML had a sample"

    def __exit__(self, *_):
        self._stop.set()
        if self._thread:
            self._thread.join()


def format_bandwidth(gigabytes):
    value, unit = (gigabytes, "GB/s") if gigabytes >= 0.1 else (gigabytes * 1e3, "MB/s")
    return f"{value:.1f} {unit}" if value >= 9.995 else f"{value:.2f} {unit}"


def _table(header, rows):
    widths = [max(len(cell), *(len(line[i]) for line in rows)) for i, cell in enumerate(header)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in [header, *rows]]
    rule = "-|-".join("-" * width for width in widths) + "-"
    return [lines[0], rule, *lines[1:]]


def text_report(report, details=False):
    """The text block of a run: five columns, then the details, then the transport."""
    rows = report["rows"]
    lines = ["=== NIXL Benchmark Results ===", f"Backend: {report['backend']}",
             f"Memory Type: {report['memory_text']}", f"Operation: {report['operation']}"]
    lines += [f"Note: {note}" for note in report.get("notes", ())]
    lines.append("")
    lines += _table(
        ["Buffer Size", "Bandwidth", "Latency (μs)", "P95 (μs)", "P99 (μs)"],
        [[format_size(r["buffer_size_bytes"]), format_bandwidth(r["bandwidth_gbps_decimal"]),
          f"{r['latency_us_mean']:.1f}", f"{r['latency_us_p95']:.1f}", f"{r['latency_us_p99']:.1f}"] for r in rows])
    lines += ["", "Details"]
    lines += _table(
        ["Buffer Size", "P50 (μs)", "IOPS", "CPU %", "GPU %", "Data"],
        [[format_size(r["buffer_size_bytes"]), f"{r['latency_us_p50']:.1f}", f"{r['iops']:.0f}",
          f"{r['cpu_percent']:.0f}", "n/a" if r["gpu_percent"] is None else f"{r['gpu_percent']:.0f}",
          r["consistency"]] for r in rows])
    if details:
        lines += ["", "Phases"]
        lines += _table(
            ["Buffer Size", "Prep (μs)", "P99 Prep (μs)", "Post (μs)", "P99 Post (μs)", "Tx (μs)", "P99 Tx (μs)"],
            [[format_size(r["buffer_size_bytes"]), _number(r["prep_us_mean"]), _number(r["tails_us"].get("prep")),
              _number(r["post_us_mean"]), _number(r["tails_us"].get("post")), _number(r["tx_us_mean"]),
              _number(r["tails_us"].get("tx"))] for r in rows])
    lines += ["", f"Transport: {report['path'] or 'unknown'}"]
    return "\n".join(lines)


def _number(value):
    return "n/a" if value is None else f"{value:.1f}"


def json_report(report):
    shown = {key: value for key, value in report.items() if key != "memory_text"}
    shown["rows"] = [{key: r[key] for key in ROW_KEYS} for r in report["rows"]]
    return json.dumps(shown, indent=2)


def csv_report(report):
    out = io.StringIO()
    writer = csv.DictWriter(out, ROW_KEYS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(report["rows"])
    return out.getvalue().rstrip("\n")


def host_facts():
    """What a figure needs to be reproduced on a like machine."""
    cpu = ""
    try:
        with open("/proc/cpuinfo") as info:
            cpu = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "")
    except OSError:
        pass
    return {"name": platform.node(), "kernel": platform.release(), "cpu": cpu, "cores": os.cpu_count(),
            "gpus": _names("/proc/driver/nvidia/gpus"), "nics": _names("/sys/class/infiniband")}


def _names(folder):
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def plot_report(report, path):
    """Bandwidth and latency over the size as a picture (needs matplotlib)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["rows"]
    sizes = [r["buffer_size_bytes"] for r in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.plot(sizes, [r["bandwidth_gbps_decimal"] for r in rows], marker="o")
    left.set(xscale="log", xlabel="bytes a descriptor", ylabel="GB/s", title=f"{report['backend']} {report['operation']}")
    for key, label in (("latency_us_p50", "P50"), ("latency_us_p95", "P95"), ("latency_us_p99", "P99")):
        right.plot(sizes, [r[key] for r in rows], marker="o", label=label)
    right.set(xscale="log", yscale="log", xlabel="bytes a descriptor", ylabel="μs", title=report["memory_text"])
    right.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
