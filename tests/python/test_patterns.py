"""The transfer patterns with real processes, two to eight of them, results compared with what one process computes."""

import multiprocessing
import pathlib
import sys
import time

import numpy
import pytest
from agents import need_backend

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "integrations"))
pytest.importorskip("nixl._native", reason="the nixl package is not built")

from nixl_integrations import patterns  # noqa: E402

pytestmark = pytest.mark.timeout(120)
LIMIT_S = 60


def make_agent(name):
    import nixl

    return nixl.nixl_agent(name, nixl.nixl_agent_config(backends=["UCX"]))


def rank_main(pipe, name, body, arguments):
    """Registers the rank's tensor, tells its place, learns everyone's, runs `body`, answers with what it returns."""
    agent = make_agent(name)
    tensor = BODIES[body][0](*arguments)
    registered = agent.register_memory([tensor])
    pipe.send((agent.get_agent_metadata(), patterns.place(name, tensor)))
    places = []
    for metadata, where in pipe.recv():
        if where[0] != name:
            agent.add_remote_agent(metadata)
        places.append(where)
    pipe.send("connected")
    assert pipe.recv() == "go"
    pipe.send(BODIES[body][1](agent, tensor, {where[0]: where for where in places}, *arguments))
    pipe.recv()
    agent.deregister_memory(registered)


def run(ranks, kill=()):
    """`ranks`: (name, body, arguments). Returns {name: answer}; those of `kill` die after connecting."""
    context = multiprocessing.get_context("spawn")
    started = []
    for name, body, arguments in ranks:
        ours, theirs = context.Pipe()
        process = context.Process(target=rank_main, args=(theirs, name, body, arguments), daemon=True)
        process.start()
        theirs.close()
        started.append((name, process, ours))

    def get(name, pipe):
        assert pipe.poll(LIMIT_S), f"{name} did not answer"
        return pipe.recv()

    try:
        cards = [get(name, pipe) for name, _, pipe in started]
        for _, _, pipe in started:
            pipe.send(cards)
        for name, _, pipe in started:
            assert get(name, pipe) == "connected"
        for name, process, pipe in started:
            if name in kill:
                process.kill()
                process.join(10)
            else:
                pipe.send("go")
        answers = {name: get(name, pipe) for name, _, pipe in started if name not in kill}
        for name, _, pipe in started:
            if name not in kill:
                pipe.send("end")
        return answers
    finally:
        for _, process, _ in started:
            process.join(5)
            if process.is_alive():
                process.kill()


def values(seed, *shape):
    return numpy.random.default_rng(seed).integers(0, 1000, shape, dtype=numpy.int64)


def wait_for(agent, senders, tag):
    deadline = time.monotonic() + LIMIT_S
    for sender in senders:
        while not agent.check_remote_xfer_done(sender, tag):
            assert time.monotonic() < deadline, f"nothing from {sender}"


def send_pair(agent, tensor, places, rank, *_):
    patterns.finish(agent, patterns.pairwise(agent, tensor, places[f"b{rank}"]))
    return None


def receive_pair(agent, tensor, _, rank, *__):
    wait_for(agent, [f"a{rank}"], b"pairwise")
    return tensor.tolist()


def read_pair(agent, tensor, places, rank, *_):
    patterns.finish(agent, patterns.pairwise(agent, tensor, places[f"a{rank}"], b"read", "READ"))
    return tensor.tolist()


def heard(agent, _, __, rank):
    wait_for(agent, [f"b{rank}"], b"read")
    return None


def work(agent, tensor, places, rank, workers, rounds):
    for number in range(rounds):
        tensor[:] = values(100 * number + rank, len(tensor))
        patterns.finish(agent, patterns.many_to_one(agent, tensor, places["aggregator"], rank, workers))
        wait_for(agent, ["aggregator"], b"next")
    return None


def sum_up(agent, tensor, _, workers, rounds):
    sums, lost = [], set()
    for _ in range(rounds):
        names = [f"worker_{i}" for i in range(workers) if f"worker_{i}" not in lost]
        written, gone = patterns.aggregate(agent, names, timeout=LIMIT_S)
        lost.update(gone)
        parts = tensor.reshape(workers, -1)
        sums.append(sum(parts[int(name.split("_")[1])] for name in written).tolist())
        for name in written:
            agent.send_notif(name, b"next")
    return sums, sorted(lost)


def broadcast(agent, tensor, places, receivers):
    patterns.finish(agent, patterns.one_to_many(agent, tensor, [places[f"r{i}"] for i in range(receivers)]))
    return None


def listen(agent, tensor, _):
    wait_for(agent, ["root"], b"broadcast")
    return tensor.tolist()


def share(agent, tensor, places, rank, group, others):
    handles = patterns.tensor_parallel(agent, tensor, rank, group, [places[f"b{i}"] for i in range(others)])
    patterns.finish(agent, handles)
    return None


def take_share(agent, tensor, _, rank, group, others):
    width, ours = 24 // others, range(rank * (24 // group), (rank + 1) * (24 // group))
    senders = [f"a{i}" for i in range(others) if set(range(i * width, (i + 1) * width)) & set(ours)]
    wait_for(agent, senders, b"shard")
    return tensor.tolist()


def columns(rank, group):
    width = 24 // group
    return numpy.ascontiguousarray(values(5, 16, 24)[:, rank * width:(rank + 1) * width])


BODIES = {
    "send_pair": (lambda rank: values(rank, 1000), send_pair),
    "receive_pair": (lambda rank: numpy.zeros(1000, dtype=numpy.int64), receive_pair),
    "read_pair": (lambda rank: numpy.zeros(1000, dtype=numpy.int64), read_pair),
    "heard": (lambda rank: values(rank, 1000), heard),
    "work": (lambda rank, workers, rounds: numpy.zeros(256, dtype=numpy.int64), work),
    "sum_up": (lambda workers, rounds: numpy.zeros(256 * workers, dtype=numpy.int64), sum_up),
    "broadcast": (lambda receivers: values(9, 5000), broadcast),
    "listen": (lambda: numpy.zeros(5000, dtype=numpy.int64), listen),
    "share": (lambda rank, group, others: columns(rank, group), share),
    "take_share": (lambda rank, group, others: numpy.zeros((16, 24 // group), dtype=numpy.int64), take_share),
}


def test_pairwise_write():
    ranks = [(f"a{i}", "send_pair", (i,)) for i in range(2)] + [(f"b{i}", "receive_pair", (i,)) for i in range(2)]
    answers = run(ranks)
    assert all(answers[f"b{i}"] == values(i, 1000).tolist() for i in range(2))


def test_pairwise_read():
    assert run([("a0", "heard", (0,)), ("b0", "read_pair", (0,))])["b0"] == values(0, 1000).tolist()


def test_aggregation_of_seven_workers():
    rounds, workers = 3, 7
    ranks = [("aggregator", "sum_up", (workers, rounds))] + [(f"worker_{i}", "work", (i, workers, rounds)) for i in range(workers)]
    sums, lost = run(ranks)["aggregator"]
    assert lost == []
    for number in range(rounds):
        assert sums[number] == sum(values(100 * number + i, 256) for i in range(workers)).tolist()


def test_a_dead_worker_is_seen_and_harms_nobody():
    workers = 3
    ranks = [("aggregator", "sum_up", (workers, 2))] + [(f"worker_{i}", "work", (i, workers, 2)) for i in range(workers)]
    sums, lost = run(ranks, kill=("worker_1",))["aggregator"]
    assert lost == ["worker_1"]
    assert sums[1] == sum(values(100 + i, 256) for i in (0, 2)).tolist()


def test_one_to_many():
    answers = run([("root", "broadcast", (3,))] + [(f"r{i}", "listen", ()) for i in range(3)])
    assert all(answers[f"r{i}"] == values(9, 5000).tolist() for i in range(3))


@pytest.mark.parametrize("group, others", [(1, 2), (4, 2), (2, 3)])
def test_tensor_parallel_between_other_degrees(group, others):
    ranks = [(f"a{i}", "share", (i, group, others)) for i in range(group)]
    ranks += [(f"b{i}", "take_share", (i, others, group)) for i in range(others)]
    answers = run(ranks)
    for i in range(others):
        assert answers[f"b{i}"] == columns(i, others).tolist()


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="7 bytes here, 8 at"):
        patterns.pairwise(None, numpy.zeros(7, dtype=numpy.uint8), ("p", 0, 8, "DRAM", 0))
    with pytest.raises(ValueError, match="3 parts of 8 bytes"):
        patterns.many_to_one(None, numpy.zeros(1), ("p", 0, 20, "DRAM", 0), 0, 3)


def test_time_that_runs_out_is_told_and_all_handles_are_released():
    import nixl

    need_backend("LOOPBACK")
    config = nixl.nixl_agent_config(backends=["LOOPBACK"], backend_params={"LOOPBACK": {"delay_us": 200_000}})
    agent = nixl.nixl_agent("slow", config)
    tensors = [numpy.zeros(64, numpy.uint8) for _ in range(2)]
    agent.register_memory(tensors)
    handles = [handle for tensor in tensors for handle in patterns.pairwise(agent, tensor, patterns.place("slow", tensor))]
    with pytest.raises(TimeoutError, match="did not end within 0.01 s"):
        patterns.finish(agent, handles, 0.01)
    assert all(handle._released for handle in handles)
