"""Rounds that were captured once (graphs, on CUDA) go on through masks, leaving, coming back and a barrier (2.14, EP-45)."""

import pytest
from ep_cases import Shape
from ep_rounds import close_rounds, join, prepare, serve_rounds, write_tables

SHAPE = Shape(ranks=4, experts_per_rank=2, max_tokens=24, hidden=1024, topk=4)
EVERYBODY = range(4)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folders = {}

    def folder(mode):
        if mode not in folders:
            folders[mode] = str(tmp_path_factory.mktemp(mode))
            write_tables(folders[mode], SHAPE, mode)
        return folders[mode]

    return folder


def through_changes(rank, folder, pairs, mode):
    """Captured alone; then every kind of change between rounds. Returns what was not as it should be."""
    prepare(rank, SHAPE, folder, pairs, 5000, mode, f"{rank.call}/rounds")
    buffer, problems = rank.state["buffer"], []
    peers = [r for r in EVERYBODY if r != rank.rank]
    islands = [2, 3] if rank.rank < 2 else [0, 1]

    def rounds(what, count, missing=()):
        rank.meet(f"{what} begins", EVERYBODY)
        seen = serve_rounds(rank, 0, count)
        if seen.masked_before != sorted(missing) or seen.named or seen.wrong:
            problems.append(f"rank {rank.rank}, {what}: {seen}")
        rank.meet(f"{what} ends", EVERYBODY)

    join(rank, EVERYBODY)
    rounds("together", 3)
    buffer.update_mask_buffer(islands, True)
    rounds("on islands", 1 + rank.rank // 2, islands)  # not equally often
    buffer.clean_mask_buffer()
    rounds("together again", 3)
    buffer.barrier()
    rounds("after a barrier", 2)
    for turn in range(3):  # the same processes part and meet again
        buffer.disconnect_ranks([3] if rank.rank != 3 else peers)
        rounds(f"apart {turn}", 1, [3] if rank.rank != 3 else peers)
        buffer.connect_ranks([3] if rank.rank != 3 else peers)
        rounds(f"reconnected {turn}", 2)
    close_rounds(rank)
    return problems


@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize("mode", ["exact", "reduced"])
def test_rounds_go_on_through_changes(ranks_of, tables, mode, pairs):
    for problems in ranks_of(4).run(through_changes, tables(mode), pairs, mode, timeout=100).values():
        assert not problems, "\n".join(problems)
