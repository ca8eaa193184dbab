"""Placement of expert replicas on ranks by load, also while some ranks are gone.

Letters: P physical experts (replicas) in all, `local` of them a rank; physical expert p lives at rank p // local whoever is alive.
"""
import collections
import enum

import torch

from nixl_integrations.elastic_state import ElasticEPStateManager


class EplbAlgorithm(enum.Enum):
    """How experts are placed: names as the engines' flags spell them; `_hierarchical` keeps groups of experts on one node."""

    deepseek = enum.auto()
    deepseek_hierarchical = enum.auto()
    deepseek_vec = enum.auto()
    deepseek_vec_hierarchical = enum.auto()
    elasticity_aware = enum.auto()
    elasticity_aware_hierarchical = enum.auto()


_HIERARCHICAL = (EplbAlgorithm.deepseek_hierarchical, EplbAlgorithm.elasticity_aware_hierarchical)
_ELASTIC = (EplbAlgorithm.elasticity_aware, EplbAlgorithm.elasticity_aware_hierarchical)


def compute_algorithm(raw, num_groups, num_nodes):
    """The algorithm named, or for "auto" the one that the numbers of expert groups and nodes allow."""
    if raw != "auto":
        return EplbAlgorithm[raw]
    fits = num_groups is not None and num_groups % num_nodes == 0
    return EplbAlgorithm.deepseek_hierarchical if fits else EplbAlgorithm.deepseek


def pack(weights, num_packs):
    """Items to packs of equal numbers: in descending weight, each to the lightest pack with a free place. Returns each item's pack
    and place in it; equal weights keep their order."""
    size = len(weights) // num_packs
    if size == 1:
        return list(range(num_packs)), [0] * num_packs
    loads, counts = [0.0] * num_packs, [0] * num_packs
    packs, places = [0] * len(weights), [0] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        chosen = min((p for p in range(num_packs) if counts[p] < size), key=lambda p: (loads[p], p))
        packs[item], places[item] = chosen, counts[chosen]
        loads[chosen] += weights[item]
        counts[chosen] += 1
    return packs, places


def replicate(weights, num_replicas):
    """The expert that each replica stands for: one each, then one more for whoever bears most a replica (lowest number on ties)."""
    replicas, counts = list(range(len(weights))), [1] * len(weights)
    while len(replicas) < num_replicas:
        chosen = max(range(len(weights)), key=lambda e: (weights[e] / counts[e], -e))
        replicas.append(chosen)
        counts[chosen] += 1
    return replicas


def _place(weights, num_physical, num_groups, num_nodes, num_gpus):
    """One layer: the logical expert of each physical one."""
    group_size, per_node, gpus = len(weights) // num_groups, num_physical // num_nodes, num_gpus // num_nodes
    groups = [sum(weights[g * group_size:(g + 1) * group_size]) for g in range(num_groups)]
    node_of, _ = pack(groups, num_nodes)
    physical = [0] * num_physical
    for node in range(num_nodes):
        experts = [g * group_size + i for g in range(num_groups) if node_of[g] == node for i in range(group_size)]
        replicas = replicate([weights[e] for e in experts], per_node)
        copies = collections.Counter(replicas)
        loads = [weights[experts[r]] / copies[r] for r in replicas]
        gpu_of, places = pack(loads, gpus)
        for replica, gpu, place in zip(replicas, gpu_of, places):
            physical[node * per_node + gpu * (per_node // gpus) + place] = experts[replica]
    return physical


def _with_holes(physical, active, local):
    """Physical experts of the active ranks alone, spread over all ranks; absent ranks get a slice of zeros."""
    rest = iter(physical)
    return [next(rest) if active[rank] else 0 for rank in range(len(active)) for _ in range(local)]


def _active_ranks(num_ranks):
    manager = ElasticEPStateManager.instance()
    if manager is None:
        return [1] * num_ranks
    active = [int(value) for value in manager.active_ranks.tolist()]
    assert len(active) >= num_ranks, f"the state knows {len(active)} ranks, {num_ranks} are placed on"
    return active[:num_ranks]


def rebalance_experts(tokens_per_expert, num_physical_experts, num_local_physical_experts, num_groups, num_nodes, algorithm):
    """Places replicas by load.

    tokens_per_expert: [steps, layers, logical], summed over steps. Returns physical_to_logical int64 [layers, P],
    logical_to_physical int64 [layers, logical, P - logical + 1] padded with -1, logical_count int64 [layers, logical].
    Raises ValueError when the active ranks have fewer places than there are experts, AssertionError when a hierarchy does not divide.
    """
    if algorithm in (EplbAlgorithm.deepseek_vec, EplbAlgorithm.deepseek_vec_hierarchical):
        raise NotImplementedError(f"{algorithm.name} is not offered; use {algorithm.name.replace('_vec', '')}")
    assert num_physical_experts % num_local_physical_experts == 0, \
        f"{num_physical_experts} physical experts are no multiple of {num_local_physical_experts} a rank"
    loads = tokens_per_expert.double().sum(dim=0)
    num_layers, num_logical = loads.shape
    num_ranks, local = num_physical_experts // num_local_physical_experts, num_local_physical_experts
    active = _active_ranks(num_ranks) if algorithm in _ELASTIC else [1] * num_ranks
    num_active = sum(active)
    if local * num_active < num_logical:
        raise ValueError(f"{num_active} active ranks hold {local * num_active} replicas, {num_logical} logical experts need one each")
    groups, nodes = (num_groups, num_nodes) if algorithm in _HIERARCHICAL and num_active == num_ranks else (1, 1)
    assert groups % nodes == 0 and num_logical % groups == 0, f"{groups} groups of {num_logical} experts do not divide over {nodes} nodes"
    assert num_active % nodes == 0, f"{nodes} nodes do not divide {num_active} GPUs"

    physical = [_with_holes(_place(row, local * num_active, groups, nodes, num_active), active, local) for row in loads.tolist()]
    most = num_physical_experts - num_logical + 1
    to_physical = torch.full((num_layers, num_logical, most), -1, dtype=torch.int64, device="cpu")
    count = torch.zeros((num_layers, num_logical), dtype=torch.int64, device="cpu")
    for layer, row in enumerate(physical):
        for place, expert in enumerate(row):
            if active[place // local]:
                to_physical[layer, expert, count[layer, expert]] = place
                count[layer, expert] += 1
    device = tokens_per_expert.device
    return torch.tensor(physical, dtype=torch.int64, device=device), to_physical.to(device), count.to(device)
