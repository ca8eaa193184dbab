"""The plans' reading, the rank server, and every plan run by real processes."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from ep_fixtures import ALL, num_gpus, devices_under_test
from plan import Plan
from rank_server import RankServer, ask, get_rank, release_rank

HERE = pathlib.Path(__file__).parent
PLANS = sorted(file.stem for file in HERE.glob("*.json"))
SMALL = ["--num-tokens", "16", "--hidden-dim", "512", "--num-topk", "4", "--runs", "5"]
PROCESSES = {"no_expansion": 4, "expansion_fault_contraction": 4, "single_rank": 1, "single_expansion_16_ranks": 16}


# ---------------------------------------------------------------------------------------------------------------- plans


def test_every_plan_is_here():
    assert PLANS == sorted(
        "no_expansion single_expansion single_expansion_16_ranks double_expansion expansion_contraction "
        "expansion_kill_expansion expansion_fault_contraction single_rank".split()
    )


def test_what_a_plan_says():
    plan = Plan.load(str(HERE / "expansion_fault_contraction.json"))
    assert plan.max_num_ranks == 4 and len(plan) == 4
    assert [plan.starts_at(rank) for rank in range(5)] == [0, 0, 1, 1, None]
    assert plan.new(0, 1, 0) == [0] and plan.new(1, 0, 0) == [2, 3] and plan.new(1, 3, 1) == [0, 1, 2]
    assert plan.killed(2) == [2] and plan.active(2) == [0, 1, 3] and plan.present(2) == [0, 1, 2, 3]
    assert plan.removed(2) == [] and plan.removed(3) == [1] and plan.new(2, 0, 0) == []


def test_a_killed_rank_starts_again_where_the_plan_takes_it_back():
    plan = Plan.load(str(HERE / "expansion_kill_expansion.json"))
    assert plan.removed(2) == [5] and plan.killed(2) == [6]
    assert plan.starts_at(6, 2) == 3 and plan.starts_at(5, 2) == 3
    assert plan.new(3, 0, 0) == [5, 6] and plan.new(3, 6, 3) == [0, 1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("wrong", [{}, [], [3], [[1, "2"]], [[1, -1]], [[-1]], [[0], []]], ids=str)
def test_wrong_plans_are_refused(wrong):
    with pytest.raises(ValueError):
        Plan.check(wrong)


# ---------------------------------------------------------------------------------------------------------- rank server


@pytest.fixture
def server():
    server = RankServer(0, "127.0.0.1")
    yield server
    server.close()


def test_ranks_are_given_released_and_given_again(server):
    def rank(host):
        return get_rank("127.0.0.1", server.port, host)

    assert [rank("a"), rank("a"), rank("b"), rank("b"), rank("a")] == [
        (0, 0, None),
        (1, 1, None),
        (0, 2, None),
        (1, 3, None),
        (2, 4, None),
    ]
    release_rank("127.0.0.1", server.port, 3, 7)
    release_rank("127.0.0.1", server.port, 1, 2)
    assert rank("c") == (0, 1, 2)  # smallest released id, with what was stored
    assert rank("a") == (1, 3, 7)  # lowest number free on that host
    assert rank("a") == (3, 5, None)


def test_wrong_lines(server):
    assert ask("127.0.0.1", server.port, "RELEASE_RANK 0 1") == "ERROR: No ranks to release"
    assert ask("127.0.0.1", server.port, "RELEASE_RANK none").startswith("ERROR")
    assert ask("127.0.0.1", server.port, "").startswith("ERROR")
    with pytest.raises(RuntimeError, match="rank 4"):
        release_rank("127.0.0.1", server.port, 4, 0)


# ----------------------------------------------------------------------------------------------------------------- runs


def launch(*arguments, device="cpu"):
    command = [sys.executable, str(HERE / "elastic.py"), "--device", device, "--limit-seconds", "240", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, timeout=280) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


@pytest.fixture(params=devices_under_test())
def device(request):
    return request.param


def need_gpus(device, count):
    if device == "cuda" and num_gpus() < count:
        pytest.skip(f"{count} ranks need {count} GPUs, there are {num_gpus()}")


def run_plan(plan, device, tmp_path, *arguments):
    report = tmp_path / "report.jsonl"
    ports = ["--store-port", "0", "--rank-server-port", "0"]
    count = str(PROCESSES.get(plan, 8))
    output = finish(
        launch("--plan", f"{plan}.json", "--num-processes", count, "--report", str(report), *ports, *arguments, device=device)
    )
    return output, [json.loads(line) for line in report.read_text().splitlines()]


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_runs(name, device, tmp_path):
    plan = Plan.load(str(HERE / f"{name}.json"))
    need_gpus(device, plan.max_num_ranks)
    output, reports = run_plan(name, device, tmp_path, *SMALL, "--validate-phase-failures", "--timeout-ms", "2000")
    seen = {(report["phase"], report["rank"]) for report in reports}
    assert seen == {(phase, rank) for phase in range(len(plan)) for rank in plan.active(phase)}
    for report in reports:
        assert report["checked"] == 16 and report["device"] == device
        assert report["failed"] == plan.killed(report["phase"])
        assert report["dispatch_us_median"] > 0 and report["combine_gb_per_s"] > 0
        assert {fault["rank"] for fault in report["faults"]} <= set(report["failed"])
    assert "every check held" in output


@pytest.mark.skipif(not ALL, reason="long: full size, 50 repetitions; set NIXL_TEST_ALL=1")
def test_a_fault_never_spreads(device, tmp_path):
    need_gpus(device, 4)
    size = ["--num-experts-per-rank", "32", "--num-topk", "8", "--num-tokens", "256", "--timeout-ms", "10000"]
    if device == "cpu":
        size[1], size[5] = "8", "32"
    for _ in range(50):
        run_plan("expansion_fault_contraction", device, tmp_path, *size, "--validate-phase-failures", "--runs", "10")


def test_two_launchers(device):
    """The second launcher's ranks are started independently and join through --tcp-server."""
    need_gpus(device, 8)
    first = launch(
        *("--plan", "single_expansion.json", "--num-processes", "4", "--store-port", "0", "--rank-server-port", "0"),
        *SMALL,
        device=device,
    )
    line = first.stdout.readline() + first.stdout.readline()
    store, ranks = re.search(r"TCPStore on port (\d+), rank server on port (\d+)", line).groups()
    second = launch(
        *("--plan", "single_expansion.json", "--num-processes", "4", "--tcp-server", "127.0.0.1"),
        *("--store-port", store, "--rank-server-port", ranks, *SMALL),
        device=device,
    )
    assert "every check held" in finish(first) and "every check held" in finish(second)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plan", "nowhere.json"], "single_expansion.json"),
        (["--plan", "single_rank.json", "--kineto"], "cuda"),
    ],
    ids=str,
)
def test_wrong_commands_say_what_to_do(arguments, says):
    process = launch(*arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and says in output


@pytest.mark.parametrize(
    ("plan", "arguments", "says"),
    [
        ("[[0]]", ["--num-experts-per-rank", "40", "--num-topk", "33"], "rank 0 ended with exit code 1"),
        ("[[0, 1]]", ["--limit-seconds", "6"], "not finished after --limit-seconds 6"),
    ],
    ids=["an error in a rank", "a rank that never comes"],
)
def test_what_goes_wrong_fails_the_run(tmp_path, plan, arguments, says):
    file = tmp_path / "plan.json"
    file.write_text(plan)
    process = launch(
        *("--plan", str(file), "--num-processes", "1", "--store-port", "0", "--rank-server-port", "0", *SMALL), *arguments
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and says in output, output


def test_default_ports_are_the_documented_ones():
    from elastic import parse

    options = parse([])
    assert (options.store_port, options.rank_server_port, options.num_processes) == (9999, 10_000, 8)
    assert (options.num_tokens, options.num_experts_per_rank, options.hidden_dim) == (128, 2, 7168)
    assert (options.num_topk, options.timeout_ms, options.plan) == (8, 30_000, "plan.json")
    assert os.path.exists(HERE / "README.md")
