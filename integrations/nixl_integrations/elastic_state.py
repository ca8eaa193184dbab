"""Which ranks of an elastic expert-parallel group are alive, as the whole process sees it."""
import threading

import torch


class ElasticEPStateManager:
    """One a process: `active_ranks`, int32 [ranks], 1 = alive. Without one, every rank counts as alive."""

    _instance = None
    _lock = threading.Lock()

    def __init__(self, num_ranks, device="cpu"):
        self.num_ranks = num_ranks
        self.device = device
        self.active_ranks = self.healthy_rank_state()

    @classmethod
    def instance(cls):
        """The manager of this process, or None."""
        return cls._instance

    @classmethod
    def init(cls, num_ranks, device="cpu"):
        """Makes the process's manager, or gives back the one there is."""
        with cls._lock:
            if cls._instance is None:
                cls._instance = cls(num_ranks, device)
            return cls._instance

    @classmethod
    def reset(cls):
        """Forgets it."""
        with cls._lock:
            cls._instance = None

    def healthy_rank_state(self):
        """A fresh int32 [ranks] of ones."""
        return torch.ones(self.num_ranks, dtype=torch.int32, device=self.device)
