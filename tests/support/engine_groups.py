"""What engines hand to the adapters, for tests: process groups by rank and size, coordinators with a store."""
from types import SimpleNamespace


class Group:
    """A process group as far as the adapters ask it."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def coordinator(store):
    """A group coordinator that has a store."""
    return SimpleNamespace(store=store)
