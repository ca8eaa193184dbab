"""The `device` and `ranks_of` fixtures of the expert-parallel suites; a folder's conftest imports them."""

import os

import pytest
from ep_ranks import RankGroup

ALL = os.environ.get("NIXL_TEST_ALL") == "1"  # the long variants


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def devices_under_test() -> list[str]:
    """NIXL_EP_TEST_DEVICE names them ("cpu", "cuda", "cpu,cuda"); default: cpu, and cuda where there is a GPU."""
    named = os.environ.get("NIXL_EP_TEST_DEVICE")
    if named:
        return named.split(",")
    return ["cpu", "cuda"] if num_gpus() else ["cpu"]


@pytest.fixture(scope="session", params=devices_under_test())
def device(request):
    return request.param


@pytest.fixture(scope="session")
def _groups():
    groups = {}
    yield groups
    for group in groups.values():
        group.close()


@pytest.fixture
def ranks_of(_groups, device, request):
    """ranks_of(n): the n rank processes on `device`, kept from test to test unless one failed."""

    def get(size: int) -> RankGroup:
        if device == "cuda" and size > num_gpus() and os.environ.get("NIXL_EP_TEST_SHARE_GPU") != "1":
            pytest.skip(f"{size} ranks need {size} GPUs, there are {num_gpus()}")
        group = _groups.get((device, size))
        if group is None or group.broken:
            group = _groups[device, size] = RankGroup(size, device)
        return group

    yield get
    if getattr(request.node, "failed", False):
        for group in _groups.values():
            group.abandon()
