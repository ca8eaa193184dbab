"""The frame of every benchmark script: set-up, check, warm-up, timed loop, check again, report.

A script derives from Benchmark, gives its flags and its lanes, and ends with `sys.exit(run(MyBenchmark))`. A lane is one
transfer that can be repeated: open() makes the request, post() and poll() move it, fill() and check() prove the bytes.
Exit codes: 0 ok, 1 transfer error or wrong bytes, 2 usage, 77 skipped with one line `SKIP: <backend>: <reason>`.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import threading
import time
import traceback

from utils import config, metrics

os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")  # the package's log shares standard output with the report
ROOT = pathlib.Path(__file__).resolve().parents[2]
SKIPPED = 77


class Skip(Exception):
    """The run cannot take place here; the text says what is missing."""


class Failure(Exception):
    """The run went wrong in a way that its text explains."""


class Usage(Failure):
    """Flags that do not fit each other or this script: exit code 2, as for those that the parser refuses."""


class Done(Exception):
    """The run ended well and has no figures to print: this process was the other side's partner."""


class Lane:
    """One repeatable transfer of `batch` descriptors. Times are taken by the caller; nothing here prints."""

    def open(self):
        """Makes the request (part of the timed transfer with --recreate_xfer)."""

    def close(self):
        """Drops the request."""

    def register(self):
        """Registers the memory (again each iteration with --reregister_mem)."""

    def deregister(self):
        """Takes the registration back."""

    def post(self):
        """Starts the transfer; True when it is already done."""
        raise NotImplementedError

    def poll(self):
        """True when the transfer is done."""
        raise NotImplementedError

    def fill(self, salt):
        """Puts a fresh pattern at the source and something else at the destination."""
        raise NotImplementedError

    def check(self, salt):
        """First wrong byte's offset at the destination, or None."""
        raise NotImplementedError

    def path(self):
        """The transport used, for the report's last line."""
        return ""


class AgentLane(Lane):
    """A lane over a nixl agent's request. Sub-classes set `agent` and make `self.handle` in open()."""

    agent = handle = None
    _path = ""

    def close(self):
        if self.handle is not None:
            self._path = self.agent.query_xfer_path(self.handle)
            self.agent.release_xfer_handle(self.handle)
            self.handle = None

    def post(self):
        return self.agent.transfer(self.handle) == "DONE"

    def poll(self):
        return self.agent.check_xfer_state(self.handle) == "DONE"

    def path(self):
        return self.agent.query_xfer_path(self.handle) if self.handle is not None else self._path


class Benchmark:
    """Base of the scripts; every hook may raise Skip or Failure."""

    backend = "UCX"
    sizes = "4KB,64KB,1MB"
    description = ""
    remote = False  # the other side is another process or host

    def __init__(self, options):
        self.options = options

    @classmethod
    def add_flags(cls, parser):
        """The script's own flags."""

    def set_up(self):
        """Before the first size: agents, partner, files."""

    def tear_down(self):
        """Always called, also after errors."""

    def make_lanes(self, size):
        """Lanes of one size: num_threads lists of pipeline_depth lanes."""
        raise NotImplementedError

    def drop_lanes(self, lanes):
        """Gives back what make_lanes took."""

    def memory_text(self):
        def side(kind):
            return f"VRAM (GPU {self.options.gpu_id})" if kind == "VRAM" else kind

        target = side(self.options.target_mem)
        if self.remote:
            target = target[:-1] + ", Remote)" if target.endswith(")") else target + ", Remote"
        return f"{side(self.options.initiator_mem)} -> {target}"

    def notes(self):
        """Lines below the report's header, say the state of the page cache."""
        return []

    def uses_gpu(self):
        return "VRAM" in (self.options.initiator_mem, self.options.target_mem)

    def operations(self):
        """Operations that a run goes through, one report each."""
        return [self.options.operation]

    def steps(self):
        """(bytes of a descriptor, descriptors) of each row."""
        return [(size, self.options.batch_size) for size in self.options.buffer_sizes]

    def text(self, report):
        """The report as people read it."""
        return metrics.text_report(report, self.options.details)


def run(benchmark_class, argv=None):
    """Runs a script from its command line; returns the exit code."""
    parser = config.Parser(description=benchmark_class.description or benchmark_class.__doc__)
    config.common_flags(parser, backend=benchmark_class.backend, sizes=benchmark_class.sizes)
    benchmark_class.add_flags(parser)
    options = config.parse_options(parser, argv)
    watchdog = threading.Timer(options.timeout_s, _out_of_time, [options.timeout_s])
    watchdog.daemon = True
    watchdog.start()
    benchmark = benchmark_class(options)
    try:
        if options.enable_vmm and not benchmark.uses_gpu():
            print("SKIP: --enable_vmm: no VRAM in this run", file=sys.stderr)
        return _run(benchmark)
    except Skip as reason:
        print(f"SKIP: {options.backend}: {reason}")
        return SKIPPED
    except Done:
        return 0
    except Failure as reason:
        print(f"FAIL: {reason}", file=sys.stderr)
        return 2 if isinstance(reason, Usage) else 1
    except KeyboardInterrupt:
        return 1
    except Exception as error:
        if os.environ.get("NIXL_BENCHMARK_TRACE"):
            traceback.print_exc()
        print(f"FAIL: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    finally:
        watchdog.cancel()


def _out_of_time(seconds):
    print(f"FAIL: not finished after --timeout_s {seconds}", file=sys.stderr, flush=True)
    os._exit(1)


def _run(benchmark):
    failed = False
    try:
        benchmark.set_up()
        reports = []
        for operation in benchmark.operations():
            benchmark.options.operation = operation
            report = _measure_all(benchmark)
            reports.append(report)
            failed |= any(row["consistency"] != "PASS" for row in report["rows"])
    finally:
        benchmark.tear_down()
    _publish(benchmark, reports)
    return 1 if failed else 0


def _measure_all(benchmark):
    options, rows, path, gpu_reason = benchmark.options, [], "", ""
    steps = benchmark.steps()
    for index, (size, options.batch_size) in enumerate(steps):
        _progress(f"{options.operation} {config.format_size(size)} x {options.batch_size} ({index + 1} of {len(steps)})")
        lanes = benchmark.make_lanes(size)
        try:
            row, path, gpu_reason = _measure(benchmark, lanes, size)
            rows.append(row)
        finally:
            benchmark.drop_lanes(lanes)
    _progress("")
    report = {
        "backend": options.backend, "operation": options.operation, "initiator_mem": options.initiator_mem,
        "target_mem": options.target_mem, "memory_text": benchmark.memory_text(), "host": metrics.host_facts(),
        "version": version(), "git": commit(), "argv": [sys.argv[0], *options.argv], "path": path, "rows": rows,
        "notes": benchmark.notes(),
    }
    if gpu_reason:
        report["gpu_reason"] = gpu_reason
    return report


def _measure(benchmark, lanes, size):
    """One size: proves the bytes, warms up, times, proves again. Returns (row, path, why there is no GPU figure)."""
    options = benchmark.options
    timed, warmup = config.iterations_for(options, size)
    everything = [lane for thread in lanes for lane in thread]
    for lane in everything:
        if not options.reregister_mem:
            lane.register()
        if not options.recreate_xfer and not options.reregister_mem:
            lane.open()
    consistency = _prove(options, everything, salt=1)
    _timed_threads(options, lanes, max(1, warmup) if options.verify_data else warmup)
    if benchmark.uses_gpu():
        with metrics.GpuMeter(options.gpu_id) as meter:
            samples = _timed_threads(options, lanes, timed)
        samples.gpu_percent, gpu_reason = meter.percent, meter.reason
    else:
        samples, gpu_reason = _timed_threads(options, lanes, timed), "no VRAM in this run"
    if consistency == "PASS":
        for salt in range(2, 2 + (timed if options.verify_data else 1)):
            consistency = _prove(options, everything, salt)
            if consistency != "PASS":
                break
    path = everything[0].path()
    for lane in everything:
        lane.close()
        if not options.reregister_mem:
            lane.deregister()
    return metrics.row(size, options.batch_size, samples, consistency), path, gpu_reason


def _prove(options, lanes, salt):
    for lane in lanes:
        lane.fill(salt)
        _begin(options, lane)
        if not lane.post():
            _finish(lane)
        bad = lane.check(salt)
        _end(options, lane)
        if bad is not None:
            return f"FAIL ({bad})"
    return "PASS"


def _finish(lane):
    while not lane.poll():
        pass


def _begin(options, lane):
    if options.reregister_mem:
        lane.register()
    if options.reregister_mem or options.recreate_xfer:
        lane.open()


def _end(options, lane):
    if options.reregister_mem or options.recreate_xfer:
        lane.close()
    if options.reregister_mem:
        lane.deregister()


@dataclasses.dataclass
class _Thread:
    latency: list
    prep: list
    post: list
    error: BaseException | None = None


def _timed_threads(options, lanes, count):
    """`count` transfers in each thread, --pipeline_depth of them in flight; all samples together."""
    fresh = options.recreate_xfer or options.reregister_mem
    results = [_Thread([0] * count, [0] * (count if fresh else 0), [0] * count) for _ in lanes]
    cpu, start = metrics.cpu_seconds(), time.perf_counter_ns()
    if len(lanes) == 1:
        _loop(options, lanes[0], count, fresh, results[0])
    else:
        threads = [threading.Thread(target=_guarded, args=(options, lane, count, fresh, result))
                   for lane, result in zip(lanes, results)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if result.error:
                raise result.error
    wall = max(1, time.perf_counter_ns() - start) / 1e9
    def joined(name):
        return [value for result in results for value in getattr(result, name)]

    return metrics.Samples(joined("latency"), joined("prep"), joined("post"), wall, metrics.cpu_seconds() - cpu)


def _guarded(options, lanes, count, fresh, result):
    try:
        _loop(options, lanes, count, fresh, result)
    except BaseException as error:
        result.error = error


def _loop(options, lanes, count, fresh, result):
    clock, depth = time.perf_counter_ns, min(len(lanes), max(count, 1))
    if depth == 1:
        _loop_one(options, lanes[0], count, fresh, result)
        return
    started, index_of, next_index, finished = [0] * depth, [-1] * depth, 0, 0
    while finished < count:
        for place in range(depth):
            lane, done = lanes[place], False
            if index_of[place] < 0:
                if next_index >= count:
                    continue
                index_of[place], next_index = next_index, next_index + 1
                began = clock()
                if fresh:
                    _begin(options, lane)
                    result.prep[index_of[place]] = clock() - began
                started[place] = clock()
                done = lane.post()
                result.post[index_of[place]] = clock() - started[place]
            if done or lane.poll():
                result.latency[index_of[place]] = clock() - started[place]
                _end(options, lane)
                index_of[place], finished = -1, finished + 1


def _loop_one(options, lane, count, fresh, result):
    clock, post, poll = time.perf_counter_ns, lane.post, lane.poll
    for index in range(count):
        if fresh:
            began = clock()
            _begin(options, lane)
            result.prep[index] = clock() - began
        began = clock()
        done = post()
        posted = clock()
        while not done:
            done = poll()
        result.latency[index] = clock() - began
        result.post[index] = posted - began
        if fresh:
            _end(options, lane)


def _publish(benchmark, reports):
    options = benchmark.options
    texts = [benchmark.text(report) for report in reports]
    if options.format == "text":
        body = "\n\n".join(texts)
    elif options.format == "json":
        body = "\n".join(map(metrics.json_report, reports))
    else:
        body = "\n".join(map(metrics.csv_report, reports))
    if options.output:
        pathlib.Path(options.output).write_text(body + "\n")
        print("\n\n".join(texts))
    else:
        print(body)
    if options.plot:
        for index, report in enumerate(reports):
            path = pathlib.Path(options.plot)
            metrics.plot_report(report, path if len(reports) == 1 else path.with_stem(f"{path.stem}_{index}"))


def _progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def version():
    try:
        return importlib.metadata.version("nixl")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


def commit():
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                              timeout=5)
        return done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def warn_unused(options, names, why):
    """One line for each flag of `names` that was given but means nothing here."""
    given = {word[2:].replace("-", "_").split("=")[0] for word in options.argv if word.startswith("--")}
    for name in names:
        if name in given:
            print(f"note: --{name} has no effect: {why}", file=sys.stderr)


def agent_config(options, **extra):
    """nixl_agent_config of the flags: backend, its parameters, progress thread, threads."""
    import nixl

    params = {options.backend: options.backend_params} if options.backend_params else None
    return nixl.nixl_agent_config(enable_prog_thread=options.enable_pt, num_threads=options.progress_threads,
                                  backends=[options.backend], backend_params=params, **extra)


def plugin_report():
    """What the package says of each backend, or Skip where there is no package."""
    try:
        import nixl
    except ImportError as error:
        raise Skip(f"the nixl package cannot be imported: {error}") from None
    return nixl.plugin_report()


def require_backend(options):
    """Skip with the backend's own reason where it cannot run."""
    report = plugin_report().get(options.backend)
    if report is None:
        raise Skip("no such backend")
    if not report["available"]:
        raise Skip(report["reason"])


def make_agent(name, options, **extra):
    """A nixl agent with the backend of the flags, or Skip with the backend's own reason."""
    require_backend(options)
    import nixl

    agent = nixl.nixl_agent(name, agent_config(options, **extra))
    if options.backend not in agent.backends:
        raise Skip("the backend was not created")
    return agent
