"""Real kills and stops at random points: survivors finish with the right rest, name exactly the victim, and take it
back. NIXL_TEST_ALL=1 makes 200 of the 20 faults; NIXL_EP_FAULT_SEED picks other points."""

import os
import random
import signal
import statistics
import time

import pytest
from ep_cases import Options, Shape, run_combine, run_dispatch
from ep_faults import (
    SHAPE,
    TIMEOUT_MS,
    Service,
    close_service,
    expected_dispatch,
    group_inputs,
    mask_values,
    open_service,
    replace_peer,
    serve,
    unmask_everyone,
)
from ep_fixtures import ALL
from ep_oracle import Payload
from ep_ranks import RankGroup

FAULTS = 200 if ALL else 20
SEED = int(os.environ.get("NIXL_EP_FAULT_SEED", "1"))
SLACK_S = 1.0  # detection may take this much longer than the timeout
RANKS = range(4)


@pytest.fixture
def group(ranks_of, request):
    """Four ranks with an open service; a parameter is its timeout in milliseconds."""
    group = ranks_of(4)
    group.timeout_ms = getattr(request, "param", TIMEOUT_MS)
    group.run(open_service, request.node.name, None, group.timeout_ms)
    yield group
    if not request.node.failed:
        group.run(close_service)


def others(*victims):
    return [rank for rank in RANKS if rank not in victims]


def wait_for_progress(group: RankGroup, rank: int, operation: int, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while group.progress[rank] < operation:
        assert time.monotonic() < deadline, f"rank {rank} is still at operation {group.progress[rank]}"
        time.sleep(0.0003)


def start_serving(group: RankGroup, victims, present=RANKS, **keywords):
    """Everyone serves until end_serving; (pending of the survivors, pending of the victims)."""
    for rank in RANKS:
        group.progress[rank] = 0
    group.ending[0] = group.ending[1] = 0
    alive = [rank for rank in present if rank not in victims]
    group.without_core = group.waited_for_cores(alive)
    keywords["leader"] = (alive or list(present))[0]
    return group.start(serve, None, ranks=alive, **keywords), group.start(serve, None, ranks=list(victims), **keywords)


def end_serving(group: RankGroup, *pending, past: int = 0) -> list[dict[int, Service]]:
    """Ends it once all of the first of `pending` are past that operation."""
    for rank in pending[0].waiting:
        wait_for_progress(group, rank, past)
    group.ending[0] = 1
    return [each.wait(30) for each in pending]


def check_survivors(group, results: dict[int, Service], victims, when: float) -> list[float]:
    """No wrong value, exactly the victims named; returns the detection times in seconds."""
    times, limit = [], group.timeout_ms / 1000 + SLACK_S + group.waited_for_cores(results) - group.without_core
    for rank, seen in results.items():
        assert not seen.problems, "\n".join(seen.problems)
        assert seen.named == set(victims), f"rank {rank} named {seen.named} of victims {set(victims)}"
        times.append(seen.told_at - when)
        assert times[-1] < limit, f"rank {rank} was told after {times[-1]:.3f} s of {limit:.3f}"
    return times


def check_masked(group: RankGroup, victims) -> None:
    for rank, values in group.run(mask_values, ranks=others(*victims)).items():
        assert values == [int(r in victims) for r in RANKS], f"rank {rank} masks {values}"


def check_whole(group: RankGroup, operations: int = 3) -> None:
    """Everyone serves everyone, nobody is missed."""
    for rank, seen in group.run(serve, operations).items():
        assert not seen.problems, "\n".join(seen.problems)
        assert not seen.named, f"rank {rank} named {seen.named}"


def rejoin(group: RankGroup, tag: str, victims) -> None:
    """New processes with the victims' ids, taken in by the survivors."""
    for victim in victims:
        group.respawn(victim)
    opening = group.start(open_service, tag, None, group.timeout_ms, ranks=list(victims))
    group.run(replace_peer, victims, ranks=others(*victims))
    opening.wait()
    check_whole(group)


def kill_at_random(group: RankGroup, points: random.Random, victims, number=signal.SIGKILL):
    """Kills the victims a random while after a random operation began; returns the detection times."""
    survivors, doomed = start_serving(group, victims)
    wait_for_progress(group, victims[0], points.randint(1, 6))
    time.sleep(points.random() * 0.02)  # the random part of the point
    for victim in victims:
        when = group.signal(victim, number)
        doomed.forget(victim)
    reached = max(group.progress[victim] for victim in victims)
    times = check_survivors(group, end_serving(group, survivors, past=reached + 3)[0], victims, when)
    check_masked(group, victims)
    return times


def tell(capsys, text: str) -> None:
    with capsys.disabled():
        print(f"\n    {text}", flush=True)


@pytest.mark.parametrize("group", [200], indirect=True)
def test_random_kills(group, request, capsys):
    points, times = random.Random(SEED), []
    for turn in range(FAULTS // 2):
        victim = points.choice(RANKS)
        times += kill_at_random(group, points, [victim])
        rejoin(group, request.node.name, [victim])
    tell(
        capsys,
        f"{FAULTS // 2} of {FAULTS // 2} kills survived; told after {1000 * statistics.median(times):.0f} ms (median), "
        f"{1000 * max(times):.0f} ms (worst), at timeout_ms={group.timeout_ms}",
    )


def test_random_stops(group, capsys):
    """A stopped rank is masked; awake again it masks the others and corrupts nobody; unmasked it is in step (EP-45)."""
    points, times = random.Random(SEED + 1), []
    for turn in range(FAULTS - FAULTS // 2):
        victim = points.choice(RANKS)
        survivors, stopped = start_serving(group, [victim])
        wait_for_progress(group, victim, points.randint(1, 6))
        time.sleep(points.random() * 0.02)  # the random part of the point
        when = group.signal(victim, signal.SIGSTOP)
        reached = group.progress[victim]
        for rank in others(victim):
            wait_for_progress(group, rank, reached + 3)
        group.signal(victim, signal.SIGCONT)
        served, woken = end_serving(group, survivors, stopped)
        times += check_survivors(group, served, [victim], when)
        for seen in woken.values():
            assert not seen.problems, "\n".join(seen.problems)
            assert seen.named == set(others(victim)), f"the woken rank named {seen.named}"
        check_masked(group, [victim])
        group.run(unmask_everyone, turn, RANKS)
        check_whole(group)
    tell(
        capsys,
        f"{len(times) // 3} of {len(times) // 3} stops survived; told after {1000 * statistics.median(times):.0f} ms "
        f"(median) at timeout_ms={group.timeout_ms}",
    )


@pytest.mark.parametrize("victims", [[0], [1, 2], [0, 3], [0, 1, 2]], ids=str)
def test_certain_victims(group, request, victims):
    """Rank 0 is nobody special; several may go at once."""
    kill_at_random(group, random.Random(SEED + 2), victims)
    rejoin(group, request.node.name, victims)


def test_terminated_rank(group, request):
    kill_at_random(group, random.Random(SEED + 3), [2], signal.SIGTERM)
    rejoin(group, request.node.name, [2])


def test_one_after_another(group, request):
    """A second rank dies while the first is still out; the first comes back before the second."""
    points = random.Random(SEED + 4)
    kill_at_random(group, points, [1])
    survivors, doomed = start_serving(group, [2], present=[0, 2, 3], lost=[1])
    time.sleep(points.random() * 0.03)  # the random part of the point
    when = group.signal(2, signal.SIGKILL)
    doomed.forget(2)
    check_survivors(group, end_serving(group, survivors, past=group.progress[2] + 3)[0], [2], when)
    rejoin(group, request.node.name, [1, 2])


def test_killed_between_operations(group, request):
    """Nothing is under way when the rank dies; the next operation masks it."""
    group.kill(3)
    begun = time.monotonic()
    group.without_core = group.waited_for_cores(others(3))
    check_survivors(group, group.run(serve, 2, ranks=[0, 1, 2]), [3], begun)
    rejoin(group, request.node.name, [3])


def test_a_short_stop_masks_nobody(ranks_of, request):
    group = ranks_of(4)
    group.run(open_service, request.node.name, None, 5000)
    survivors, stopped = start_serving(group, [2])
    wait_for_progress(group, 2, 5)
    group.signal(2, signal.SIGSTOP)
    time.sleep(0.3)  # the length of the stop
    group.signal(2, signal.SIGCONT)
    served, resumed = end_serving(group, survivors, stopped, past=group.progress[2] + 10)
    for rank, seen in (served | resumed).items():
        assert not seen.problems and not seen.named, (rank, seen)
    group.run(close_service)


def test_back_without_disconnect(group, request):
    """Survivors connect the new incarnation at once, still holding the old one (EP-64)."""
    kill_at_random(group, random.Random(SEED + 5), [1])
    group.respawn(1)
    opening = group.start(open_service, request.node.name, ranks=[1])
    group.run(connect_only, [1], ranks=others(1))
    opening.wait()
    check_whole(group)


def test_back_although_a_child_of_the_dead_rank_lives(group, request):
    """A child that the victim forked, a data loader say, holds copies of its descriptors: no survivor may take it for the rank."""
    child = group.run(fork_a_child, ranks=[1])[1]
    try:
        check_whole(group)
        kill_at_random(group, random.Random(SEED + 6), [1])
        group.respawn(1)
        opening = group.start(open_service, request.node.name, ranks=[1])
        group.run(connect_only, [1], ranks=others(1))
        opening.wait()
        check_whole(group)
    finally:
        os.kill(child, signal.SIGKILL)


def fork_a_child(rank):
    """Its number; it keeps what it inherited, but for the pipes by which the test sees that its parent is dead."""
    child = os.fork()
    if child:
        return child
    for number in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{number}").startswith("pipe:"):
                os.close(int(number))
        except OSError:
            pass
    while True:
        signal.pause()


def connect_only(rank, ranks):
    rank.state["buffer"].connect_ranks(list(ranks))


# ------------------------------------------------------------------------------------------------------- during connect


def try_connect(rank, ranks):
    """True if it connected, else the text of the error."""
    try:
        rank.state["buffer"].connect_ranks(list(ranks))
        return True
    except RuntimeError as error:
        return str(error)


def connect_until_there(rank, ranks):
    """As clients do who do not know when it comes: its process may take longer to start than one connect may last."""
    deadline = time.monotonic() + 50
    while (outcome := try_connect(rank, ranks)) is not True:
        assert time.monotonic() < deadline, outcome


def drop(rank, ranks):
    rank.state["buffer"].disconnect_ranks(list(ranks))


def limit_connects(rank, milliseconds):
    os.environ["NIXL_EP_CONNECT_TIMEOUT_MS"] = str(milliseconds)


def unlimit_connects(rank):
    os.environ.pop("NIXL_EP_CONNECT_TIMEOUT_MS", None)


@pytest.fixture
def connecting(ranks_of, request):
    """Ranks 0 to 2 serve; rank 3 is a process without a buffer; connects are limited to two seconds."""
    group = ranks_of(4)
    group.run(limit_connects, 2000)
    group.run(open_service, request.node.name, [0, 1, 2], ranks=[0, 1, 2])
    yield group
    if not request.node.failed:
        group.run(close_service)
        group.abandon()  # with it goes the limit


def test_killed_while_connecting(connecting, request):
    points = random.Random(SEED + 6)
    for turn in range(40 if ALL else 5):
        joining = connecting.start(open_service, request.node.name, ranks=[3])
        accepting = connecting.start(try_connect, [3], ranks=[0, 1, 2])
        time.sleep(points.random() * points.choice([0.02, 0.3]))  # the random part of the point
        connecting.signal(3, signal.SIGKILL)
        joining.forget(3)
        outcome = accepting.wait(30)
        for rank, result in outcome.items():
            assert result is True or "3" in result, result
        connected = [rank for rank, result in outcome.items() if result is True]
        if connected:
            connecting.run(drop, [3], ranks=connected)
        for seen in connecting.run(serve, 2, ranks=[0, 1, 2], lost=[3]).values():
            assert not seen.problems and not seen.named, seen
        connecting.respawn(3)
        connecting.run(limit_connects, 2000, ranks=[3])
    connecting.run(unlimit_connects, ranks=[3])
    joining = connecting.start(open_service, request.node.name, ranks=[3])
    connecting.run(connect_until_there, [3], ranks=[0, 1, 2])
    joining.wait()
    check_whole(connecting)


def copy_keys(rank, tag, keys, into):
    """While a connect of rank 3 waits for the others, copies what it published under other names."""
    store = rank.store(tag)
    store.wait(keys)
    for key, value in zip(keys, store.multi_get(keys)):
        store.set(into + key, value)


def plant(rank, tag, keys, values=None, source=""):
    store = rank.store(tag)
    values = values or store.multi_get([source + key for key in keys])
    for key, value in zip(keys, values):
        store.set(key, value)


@pytest.mark.parametrize("left", ["stale", "garbage", "empty"])
def test_what_lies_under_the_key_of_a_dead_rank(connecting, request, left):
    """EP-64: a predecessor's key, or rubbish, is never taken for the new process."""
    tag, keys = request.node.name, ["NIXL_EP/3"]
    joining = connecting.start(open_service, tag, ranks=[3])
    connecting.run(copy_keys, tag, keys, "kept/", ranks=[0])
    connecting.kill(3)
    joining.forget(3)
    values = {"stale": None, "garbage": [b"\x00\xff not what it should be" * 9], "empty": [b"\x01"]}[left]
    connecting.run(plant, tag, keys, values, "kept/", ranks=[0])
    for result in connecting.run(try_connect, [3], ranks=[0, 1, 2]).values():
        assert result is not True and "3" in result, result
    connecting.run(plant, tag, keys, values, "kept/", ranks=[0])
    connecting.respawn(3)
    accepting = connecting.start(connect_until_there, [3], ranks=[0, 1, 2])
    connecting.run(open_service, tag, ranks=[3])
    accepting.wait()
    check_whole(connecting)


# ----------------------------------------------------------------------------------------------------------- wait sites


def stop_before(rank, site, victim):
    """Everyone but the victim goes on past `site`; returns (phases of the faults, ranks named, ranks in the tensor)."""
    buffer, layout = rank.state["buffer"], SHAPE.layout()
    buffer.fault_status()
    tokens = group_inputs(rank, SHAPE, 0)[rank.rank]
    y = expected_dispatch(rank, SHAPE, Payload.BF16, 0, frozenset()).x
    steps = ["barrier", "dispatch", "combine"]
    for step in steps[: steps.index(site) + (rank.rank != victim)]:
        if step == "barrier":
            buffer.barrier()
        elif step == "dispatch":
            handle = run_dispatch(buffer, tokens, layout, Options(), rank.device)[2]
        else:
            run_combine(buffer, tokens, layout, y, handle, Options(), rank.device)
    if rank.device == "cuda":
        import torch

        torch.cuda.synchronize()
    faults = buffer.fault_status()
    failed = [r for r, value in enumerate(buffer.fault_tensor().tolist()) if value]
    return [str(fault.phase).lower() for fault in faults], sorted({fault.rank for fault in faults}), failed


@pytest.mark.parametrize("site", ["barrier", "dispatch", "combine"])
def test_every_wait_expires_and_says_where(group, site):
    for rank, (phases, named, failed) in group.run(stop_before, site, 1).items():
        assert named == failed == ([] if rank == 1 else [1]), (rank, named, failed)
        assert all(site in phase for phase in phases), phases
    group.run(unmask_everyone, "after", RANKS)
    check_whole(group)


def time_a_wait(rank, tag, timeout_ms):
    """Rank 0 waits for rank 1, which does nothing; returns the seconds it took and whom it named."""
    shape = Shape(ranks=2)
    open_service(rank, tag, None, timeout_ms, shape)
    rank.meet("open", range(2))
    taken, named = 0.0, []
    if rank.rank == 0:
        began = time.monotonic()
        rank.state["buffer"].barrier()
        if rank.device == "cuda":
            import torch

            torch.cuda.synchronize()
        taken = time.monotonic() - began
        named = [fault.rank for fault in rank.state["buffer"].fault_status()]
    rank.meet("waited", range(2))
    close_service(rank)
    return taken, named


@pytest.mark.parametrize("timeout_ms", [0, 50, 400])
def test_a_wait_takes_its_time(ranks_of, request, timeout_ms):
    """EP-50: by the clock on the wall; 0 does not wait."""
    taken, named = ranks_of(2).run(time_a_wait, request.node.name, timeout_ms)[0]
    assert named == [1]
    assert timeout_ms / 1000 <= taken < timeout_ms / 1000 + SLACK_S
