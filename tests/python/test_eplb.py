"""Placement of expert replicas: properties over random loads, hierarchies and absent ranks."""
import pathlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "integrations"))
from nixl_integrations.elastic_state import ElasticEPStateManager  # noqa: E402
from nixl_integrations.eplb import EplbAlgorithm as Algorithm  # noqa: E402
from nixl_integrations.eplb import compute_algorithm, pack, rebalance_experts, replicate  # noqa: E402


@pytest.fixture(autouse=True)
def no_state():
    ElasticEPStateManager.reset()
    yield
    ElasticEPStateManager.reset()


def with_active(active):
    ElasticEPStateManager.reset()
    ElasticEPStateManager.init(len(active)).active_ranks[:] = torch.tensor(active, dtype=torch.int32)


def check_tables(physical, places, counts, num_logical, local, active):
    num_ranks = len(active)
    assert physical.dtype == places.dtype == counts.dtype == torch.int64
    assert physical.shape[1] == local * num_ranks and places.shape[1] == counts.shape[1] == num_logical
    for layer in range(physical.shape[0]):
        assert counts[layer].min() >= 1 and counts[layer].sum() == local * sum(active)
        for expert in range(num_logical):
            n = counts[layer, expert]
            held = places[layer, expert]
            assert (held[n:] == -1).all() and len(set(held[:n].tolist())) == n
            for place in held[:n].tolist():
                assert active[place // local] and physical[layer, place] == expert
        for rank in range(num_ranks):
            if not active[rank]:
                assert (physical[layer, rank * local:(rank + 1) * local] == 0).all()


def heaviest_over_mean(load, places, counts, local, active):
    heaps = torch.zeros(len(active), dtype=torch.float64)
    for expert in range(len(load)):
        for place in places[expert][:counts[expert]].tolist():
            heaps[place // local] += load[expert] / float(counts[expert])
    alive = heaps[torch.tensor(active, dtype=torch.bool)]
    return float(alive.max() / alive.mean()) if alive.sum() else 1.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_flat_placement(data):
    num_ranks = data.draw(st.integers(1, 8))
    num_logical = data.draw(st.integers(1, 24))
    active = data.draw(st.lists(st.integers(0, 1), min_size=num_ranks, max_size=num_ranks).filter(any))
    local = -(-num_logical // sum(active)) + data.draw(st.integers(0, 2))
    layers = data.draw(st.integers(1, 3))
    loads = torch.tensor(data.draw(st.lists(st.integers(0, 1000), min_size=2 * layers * num_logical, max_size=2 * layers * num_logical)))
    loads = loads.view(2, layers, num_logical)
    with_active(active)
    arguments = (loads, local * num_ranks, local, 1, 1, Algorithm.elasticity_aware)
    physical, places, counts = rebalance_experts(*arguments)
    check_tables(physical, places, counts, num_logical, local, active)
    assert places.shape[2] == local * num_ranks - num_logical + 1  # whatever is active
    assert all(torch.equal(a, b) for a, b in zip((physical, places, counts), rebalance_experts(*arguments)))


@pytest.mark.parametrize("seed", range(20))
def test_load_is_spread_better_than_in_turns(seed):
    generator = torch.Generator().manual_seed(seed)
    num_ranks, num_logical, local = 8, 64, 11
    active = [1] * num_ranks
    for gone in torch.randperm(num_ranks, generator=generator)[:seed % 3].tolist():
        active[gone] = 0
    with_active(active)
    load = torch.exp(torch.randn(1, 1, num_logical, generator=generator, dtype=torch.float64) * 1.5)
    physical, places, counts = rebalance_experts(load, local * num_ranks, local, 1, 1, Algorithm.elasticity_aware)
    turns = [[] for _ in range(num_logical)]  # experts to places in turn, as a plain program would
    for n, place in enumerate(rank * local + slot for rank in range(num_ranks) if active[rank] for slot in range(local)):
        turns[n % num_logical].append(place)
    plain = torch.tensor([held + [-1] * (places.shape[2] - len(held)) for held in turns])
    load = load[0, 0].tolist()
    ours = heaviest_over_mean(load, places[0], counts[0], local, active)
    assert ours <= heaviest_over_mean(load, plain, [len(held) for held in turns], local, active) and ours < 1.5


@pytest.mark.parametrize("algorithm", [Algorithm.deepseek_hierarchical, Algorithm.elasticity_aware_hierarchical])
def test_hierarchy_keeps_groups_on_nodes(algorithm):
    loads = torch.randint(0, 100, (3, 4, 32), generator=torch.Generator().manual_seed(1))
    groups, nodes, ranks, local = 8, 2, 4, 12
    physical, places, counts = rebalance_experts(loads, ranks * local, local, groups, nodes, algorithm)
    check_tables(physical, places, counts, 32, local, [1] * ranks)
    for layer in range(4):
        for group in range(groups):
            nodes_used = {place // (local * ranks // nodes) for expert in range(group * 4, group * 4 + 4)
                          for place in places[layer, expert][:counts[layer, expert]].tolist()}
            assert len(nodes_used) == 1
    with_active([1, 0, 1, 1])
    if algorithm is Algorithm.elasticity_aware_hierarchical:  # with a hole the hierarchy is given up
        check_tables(*rebalance_experts(loads, ranks * local, local, groups, nodes, algorithm), 32, local, [1, 0, 1, 1])
    else:  # and the others know nothing of holes
        check_tables(*rebalance_experts(loads, ranks * local, local, groups, nodes, algorithm), 32, local, [1] * ranks)


def test_by_hand():
    assert pack([5.0, 1.0, 4.0, 2.0], 2) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert pack([1.0, 9.0], 2) == ([0, 1], [0, 0])
    assert replicate([90.0, 132.0, 40.0, 61.0], 6) == [0, 1, 2, 3, 1, 0]
    loads = torch.tensor([[[90, 132, 40, 61]]])
    physical, places, counts = rebalance_experts(loads, 6, 2, 1, 1, Algorithm.deepseek)
    # a replica's load: 45 66 40 61 66 45; to three GPUs: 66 + 45, 66 + 40, 61 + 45
    assert counts.tolist() == [[2, 2, 1, 1]] and physical.tolist() == [[1, 0, 1, 2, 3, 0]]
    with_active([1, 0, 1])
    physical, places, counts = rebalance_experts(loads, 6, 2, 1, 1, Algorithm.elasticity_aware)
    assert counts.tolist() == [[1, 1, 1, 1]] and physical.tolist() == [[1, 2, 0, 0, 0, 3]]
    assert places[0, :, 0].tolist() == [4, 0, 1, 5]


def test_refusals():
    loads = torch.ones(1, 1, 8)
    with_active([1, 0, 0, 1])
    with pytest.raises(ValueError, match="2 active ranks hold 6 replicas, 8 logical"):
        rebalance_experts(loads, 12, 3, 1, 1, Algorithm.elasticity_aware)
    ElasticEPStateManager.reset()
    for groups, nodes in ((3, 2), (2, 3), (5, 1)):
        with pytest.raises(AssertionError):
            rebalance_experts(loads, 12, 3, groups, nodes, Algorithm.deepseek_hierarchical)
    for algorithm in (Algorithm.deepseek_vec, Algorithm.deepseek_vec_hierarchical):
        with pytest.raises(NotImplementedError):
            rebalance_experts(loads, 12, 3, 1, 1, algorithm)
    rebalance_experts(torch.zeros(1, 1, 8), 12, 3, 1, 1, Algorithm.deepseek)  # no load at all is legal


def test_choice_of_algorithm():
    assert compute_algorithm("auto", 8, 2) is Algorithm.deepseek_hierarchical
    assert compute_algorithm("auto", 8, 3) is compute_algorithm("auto", None, 2) is Algorithm.deepseek
    assert compute_algorithm("elasticity_aware", None, 1) is Algorithm.elasticity_aware
    with pytest.raises(KeyError):
        compute_algorithm("best", 1, 1)


def test_defaults_of_torch_do_not_matter():
    """Engines set the default device and dtype of a process; tables lie where the loads lie."""
    loads = torch.arange(24, dtype=torch.float32).view(2, 3, 4)
    expected = rebalance_experts(loads, 8, 2, 1, 1, Algorithm.elasticity_aware)
    torch.set_default_device("meta")  # what is allocated without a device has no values
    torch.set_default_dtype(torch.bfloat16)
    try:
        tables = rebalance_experts(loads, 8, 2, 1, 1, Algorithm.elasticity_aware)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(table, wanted) for table, wanted in zip(tables, expected))
