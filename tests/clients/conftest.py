import pytest
from agents import need_backend


@pytest.fixture(autouse=True)
def ucx():
    need_backend("UCX")
