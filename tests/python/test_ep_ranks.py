"""The process harness itself: what ranks return, and how failures, deaths and hangs come back."""

import os
import signal
import threading
import time

import pytest
from ep_ranks import RankFailure, RankGroup


def add(rank, number):
    rank.state["calls"] = rank.state.get("calls", 0) + 1
    rank.progress[rank.rank] = number
    return rank.rank + number, rank.state["calls"]


def meet(rank):
    store = rank.store()
    store.set(str(rank.rank), os.environ["GREETING"])
    store.wait(["0", "1"])
    return [value.decode() for value in store.multi_get(["0", "1"])]


def fail_on(rank, victim):
    if rank.rank == victim:
        raise ValueError("of all things")


def exit_on(rank, victim):
    if rank.rank == victim:
        print("last words", flush=True)
        os._exit(7)


def block_on(rank, victim):
    if rank.rank == victim:
        threading.Event().wait()


@pytest.fixture
def group():
    with RankGroup(2, environment={"GREETING": "hello"}) as group:
        yield group


def test_calls_state_progress_and_store(group):
    assert group.run(add, 10) == {0: (10, 1), 1: (11, 1)}
    assert group.run(add, 20, ranks=[1]) == {1: (21, 2)}
    assert list(group.progress) == [10, 20]
    assert group.run(meet) == {0: ["hello", "hello"], 1: ["hello", "hello"]}


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (fail_on, "rank 1 failed in fail_on(?s:.*)of all things"),
        (exit_on, "rank 1 died in exit_on, exit code 7(?s:.*)last words"),
        (block_on, r"ranks \[1\] did not finish block_on in time(?s:.*)in block_on"),
    ],
)
def test_trouble_comes_back_with_its_reason(group, function, says):
    with pytest.raises(RankFailure, match=says):
        group.run(function, 1, timeout=2)
    assert group.broken and not group.process(0).is_alive()


def test_a_killed_rank_starts_again(group):
    pending = group.start(block_on, 1)
    group.kill(1)
    pending.forget(1)
    assert pending.wait(5) == {0: None}
    assert group.process(1).exitcode == -signal.SIGKILL
    group.respawn(1)
    assert group.run(add, 1) == {0: (1, 1), 1: (2, 1)}


def test_a_stopped_rank_goes_on(group):
    group.signal(1, signal.SIGSTOP)
    pending = group.start(add, 1)
    started = time.monotonic()
    group.signal(1, signal.SIGCONT)
    assert set(pending.wait(5)) == {0, 1} and time.monotonic() - started < 5
