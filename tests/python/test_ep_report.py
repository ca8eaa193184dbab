"""The report of expert parallel on GPUs (tests/gpu/ep_report.py), from lines as its programs write them."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "gpu"))

from ep_report import Run, curves, main, table  # noqa: E402


def case(kind, tokens, **figures):
    head = {"kind": kind, "case": f"{tokens} tokens", "ranks": 4, "tokens": tokens, "hidden": 7168, "experts": 128, "topk": 8, "payload": 1}
    return json.dumps(head | figures)


LINES = "\n".join(
    [json.dumps({"kind": "method", "ranks": 4, "replayed": "graphs", "kernels": "records"})]
    + [
        line
        for tokens, us in ((8, 18.0), (128, 50.0))
        for line in (
            case("replayed", tokens, dispatch_us=us / 3, combine_us=us / 2, pair_us=us, split_dispatch_us=us, split_combine_us=us,
                 memory_mb=107, dispatch_link_bytes=2e6, combine_link_bytes=4e6, pair_must_us=44.0),
            case("kernels", tokens, dispatch_us=us / 4, combine_us=us / 3, dispatch_send_us=5, dispatch_receive_us=3,
                 combine_send_us=6, combine_receive_us=4),
        )
    ]
    + [json.dumps({"kind": "link", "gpus": 4, "rate_gb_s": 400.0, "stores_gb_s": 400.0, "engines_gb_s": 200.0, "hop_us": 1.0})]
)
PROBE = """\
T    8 E 128 k 8 G  64 pair counted+pull         16.35 us
   check counted+push     calc_diff 6.54e-05 ok
T    8 E 128 k 8 G  64 pair counted+push         15.57 us
T    8 E 128 k 8 G  64 pair indexed+stores       17.58 us
T  128 E 128 k 8 G  64 pair indexed+stores       57.39 us
T  128 E 128 k 8 G 128 pair counted+push         65.96 us
T  128 E 128 k 8 G 128 pair indexed+stores       45.32 us
T  128 E 128 k 8 G 128 dispatch indexed          20.29 us
"""


@pytest.fixture
def run():
    read = Run()
    read.read(LINES)
    read.read(PROBE)
    return read


def test_the_best_draft_and_grid_of_the_probe_count(run):
    assert run.probe == {(8, 128, 8): (15.57, "counted+push", 64), (128, 128, 8): (45.32, "indexed+stores", 128)}


def test_the_floor_is_two_hops_and_the_bytes(run):
    assert run.floor_us(run.cases[4, "128 tokens"]["replayed"]) == pytest.approx(2 + 6e6 / 400e9 * 1e6)


def test_musts_are_judged(run):
    few, many = [line for line in table(run, 4).splitlines() if "tokens" in line]
    assert "44 met" in few and "44 missed" in many
    assert "12.5 / 16.7" in many and "16.7 / 25.0" in many and "17.0" in many
    assert "| 15.6 counted+push |" in few and "| 45.3 indexed+stores |" in many


def test_curves_cover_ours_the_probe_the_floor_and_peers(run):
    assert set(curves(run, 4)) == {
        "ours, replayed pair", "ours, kernels of both", "probe", "link's floor", "NIXL EP 1.4.1", "NCCL 2.28, bytes only",
    }


def test_lines_and_plot_are_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "ours").write_text(LINES)
    (tmp_path / "probe").write_text(PROBE)
    code = main([str(tmp_path / "ours"), str(tmp_path / "probe"), str(tmp_path / "absent"), "--json", str(tmp_path / "all.jsonl"),
                 "--plot", str(tmp_path / "all.png")])
    told = capsys.readouterr()
    assert code == 0 and "records" in told.out and "absent is missing" in told.err
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("replayed") == 2
    assert [(line["draft"], line["grid"]) for line in lines if line["kind"] == "probe"] == [("counted+push", 64), ("indexed+stores", 128)]
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_nothing_measured_is_no_report(tmp_path):
    (tmp_path / "ours").write_text("")
    assert main([str(tmp_path / "ours")]) == 1
