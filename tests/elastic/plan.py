"""Plans: which ranks are there in which phase.

A plan is a JSON list of phases, a phase a list of rank ids; `-r` means that rank r is killed during the phase.
"""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    phases: tuple[tuple[int, ...], ...]

    @classmethod
    def load(cls, path: str) -> Plan:
        with open(path) as file:
            return cls.check(json.load(file))

    @classmethod
    def check(cls, phases) -> Plan:
        """Raises ValueError with the phase and the id that is wrong."""
        if not isinstance(phases, list) or not phases:
            raise ValueError("a plan is a list of at least one phase")
        for number, phase in enumerate(phases):
            if not isinstance(phase, list) or not all(isinstance(rank, int) for rank in phase):
                raise ValueError(f"phase {number} is no list of rank ids: {phase!r}")
            if len({abs(rank) for rank in phase}) != len(phase):
                raise ValueError(f"phase {number} names a rank twice: {phase}")
            if not any(rank >= 0 for rank in phase):
                raise ValueError(f"phase {number} has no rank that stays: {phase}")
        return cls(tuple(tuple(phase) for phase in phases))

    def __len__(self) -> int:
        return len(self.phases)

    @property
    def max_num_ranks(self) -> int:
        return max(max(phase) for phase in self.phases) + 1

    def active(self, phase: int) -> list[int]:
        return sorted(rank for rank in self.phases[phase] if rank >= 0)

    def killed(self, phase: int) -> list[int]:
        return sorted(-rank for rank in self.phases[phase] if rank < 0)

    def present(self, phase: int) -> list[int]:
        """Active ranks and those killed during the phase."""
        return sorted(abs(rank) for rank in self.phases[phase])

    def starts_at(self, rank: int, earliest: int = 0) -> int | None:
        """The first phase, from `earliest` on, in which this rank is active; else None."""
        for phase in range(earliest, len(self)):
            if rank in self.phases[phase]:
                return phase
        return None

    def new(self, phase: int, rank: int, started: int) -> list[int]:
        """Ranks to connect at the beginning of the phase; all the others in the phase where this one starts."""
        if phase == started:
            return [other for other in self.active(phase) if other != rank]
        before = set(self.active(phase - 1))
        return [other for other in self.active(phase) if other not in before]

    def removed(self, phase: int) -> list[int]:
        """Ranks that were there before, are not any more, and were not killed on the way."""
        if phase == 0:
            return []
        before, now = self.phases[phase - 1], {abs(rank) for rank in self.phases[phase]}
        return sorted(rank for rank in before if rank >= 0 and rank not in now)
