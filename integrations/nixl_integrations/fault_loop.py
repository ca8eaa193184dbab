"""Serving through the loss of ranks: notice it in the step it happens, run that step again, place experts anew, take ranks back."""
import time

import torch


def refresh_active_ranks(buffer, mask, active_ranks):
    """active_ranks = 1 where a rank answers, else 0: masked ranks and ranks that were never connected. On the device only."""
    buffer.query_mask_buffer(mask)
    ones = torch.ones((), dtype=mask.dtype, device=mask.device)
    active_ranks.copy_((ones - mask[:active_ranks.shape[0]].abs()).clamp(0, 1))


class FaultLoop:
    """Steps of one rank. `active_ranks`: int32 [ranks watched] on the buffer's device; 1 = answers.

    on_loss(ranks) is called once for ranks newly lost: place experts anew, copy weights, switch the routing tables. After it the step
    runs again.
    """

    def __init__(self, buffer, active_ranks, on_loss):
        self.buffer, self.active_ranks, self.on_loss = buffer, active_ranks, on_loss
        self._mask = torch.empty(buffer.group_size, dtype=torch.int32, device=active_ranks.device)
        self.after_combine()
        self._seen = active_ranks.tolist()
        buffer.fault_status()  # what lies behind us is known

    def after_combine(self):
        """To be captured behind each combine: renews active_ranks on the device."""
        refresh_active_ranks(self.buffer, self._mask, self.active_ranks)

    def newly_lost(self):
        """Once a step, on the host: ranks lost since the last look, and those named by the operations of this step."""
        now = self.active_ranks.tolist()
        lost = {rank for rank, (before, after) in enumerate(zip(self._seen, now)) if before and not after}
        lost |= {fault.rank for fault in self.buffer.fault_status() if fault.rank < len(now) and self._seen[fault.rank]}
        self._seen = [after and rank not in lost for rank, after in enumerate(now)]
        return sorted(lost)

    def step(self, forward):
        """Runs forward() until a run loses nobody; its result. At most once more than there are ranks."""
        for _ in range(len(self._seen) + 1):
            result = forward()
            self.after_combine()
            lost = self.newly_lost()
            if not lost:
                return result
            self.active_ranks[lost] = 0
            self.on_loss(lost)
        raise RuntimeError("every step lost another rank")

    def readmit(self, rank, place_again=lambda: None):
        """Takes a new process of this id: connects, unmasks, places experts anew. The newcomer connects at the same time."""
        self.buffer.disconnect_ranks([rank])
        self.buffer.connect_ranks([rank], activate=False)
        self.buffer.update_mask_buffer(rank, False)
        self.after_combine()
        self._seen = self.active_ranks.tolist()
        place_again()


class MarkPoller:
    """The variant that looks once in a while, outside of captured graphs: marks are acted on only when a minority of the ranks has
    them and the last resize is some time ago; marks of ranks that answer elsewhere (`alive(rank)`) are cleared."""

    def __init__(self, buffer, num_ranks, alive, interval_s=1.0, settle_s=30.0, clock=time.monotonic):
        self.buffer, self.num_ranks, self.alive = buffer, num_ranks, alive
        self.interval_s, self.settle_s, self._clock = interval_s, settle_s, clock
        self._mask = torch.empty(buffer.group_size, dtype=torch.int32, device=buffer.fault_tensor().device)
        self._looked = self._resized = clock()

    def resized(self, num_ranks):
        """Tells that the group has another size since now."""
        self.num_ranks, self._resized = num_ranks, self._clock()

    def poll(self):
        """Ranks to be treated as lost; [] when it is not time, or when the marks cannot be trusted."""
        now = self._clock()
        if now - self._looked < self.interval_s or now - self._resized < self.settle_s:
            return []
        self._looked = now
        self.buffer.query_mask_buffer(self._mask)
        marked = [rank for rank, mark in enumerate(self._mask[:self.num_ranks].tolist()) if mark == 1]
        lost = []
        for rank in marked:
            if self.alive(rank):
                self.buffer.update_mask_buffer(rank, False)
            else:
                lost.append(rank)
        return lost if 2 * len(lost) < self.num_ranks else []
