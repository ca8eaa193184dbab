"""Rounds in which ranks tell each other, through a store, whom they have masked."""
import time
from typing import Any, List, Set, Tuple

from .stores import StoreOfTorch


class Agreements:
    """One rank's rounds. Keys are "NIXL_EP/agree/<round>/<rank>", values the masked ranks as decimal text, "-" for none."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._turn = 0  # rounds since the last restart
        self._published: List[Tuple[int, StoreOfTorch]] = []  # rounds whose keys are still in a store

    def union(self, store: Any, mine: Set[int], active: Set[int], timeout_s: float) -> Set[int]:
        """What any of the `active` ranks has masked; those that do not answer in time count as masked."""
        channel = StoreOfTorch(store, "store")
        turn, self._turn = self._turn, self._turn + 1
        self._published.append((turn, channel))
        channel.set(f"NIXL_EP/agree/{turn}/{self._rank}", " ".join(map(str, sorted(mine))).encode() or b"-")
        if len(self._published) > 2:
            self._withdraw(*self._published.pop(0))
        union, waiting = set(mine), active - {self._rank}
        end = time.monotonic() + timeout_s
        while waiting:
            for rank in [rank for rank in waiting if channel.wait(f"NIXL_EP/agree/{turn}/{rank}", 0)]:
                answer = channel.get(f"NIXL_EP/agree/{turn}/{rank}").decode()
                union |= {int(number) for number in answer.split() if number != "-"}
                waiting.discard(rank)
            waiting -= union  # whom somebody has masked is not waited for: masks must not make others late
            if waiting and time.monotonic() >= end:
                union |= waiting
                break
            time.sleep(0.001 if waiting else 0)
        return union

    def restart(self) -> None:
        """Rounds count anew, since a rank that joined cannot know how many there were; what was published is withdrawn."""
        self._turn, published, self._published = 0, self._published, []
        for turn, channel in published:
            self._withdraw(turn, channel)

    def _withdraw(self, turn: int, channel: StoreOfTorch) -> None:
        channel.remove(f"NIXL_EP/agree/{turn}/{self._rank}")
