"""Rounds: a few dispatches and combines in a row that judge themselves on the device, for ranks that serve without a pause.

Expected outputs are laid out in tables, one entry for every set of peers that may be missing, and the mask that the device holds
after an operation picks the entry. So nothing is read back between operations: on CUDA a round is a graph, replayed, and the GPU
is busy with operations nearly all of the time. That is what a kill in the middle of a kernel needs.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

import ep_oracle as oracle
import numpy as np
from ep_cases import Shape, bits_of, dispatch_arguments, open_buffer, tensor_bf16
from ep_faults import expected_combine, expected_dispatch, group_inputs, is_last
from ep_oracle import Payload
from ep_ranks import Rank

PAYLOADS = (Payload.BF16, Payload.FP8)  # of the steps of a round, in turn; their inputs differ


@dataclass
class Stretch:
    """What one rank saw while it served."""

    rounds: int = 0
    wrong: int = 0  # values that differ from what the rest must give
    masked_before: list = field(default_factory=list)
    named: set = field(default_factory=set)
    told_at: float | None = None  # when the round that named the first of them was over (monotonic)
    stalled_ms: float = 0.0  # how much longer than usual that round took
    usual_ms: float = 0.0


def subsets(rank: int, ranks: int):
    """(bits, set) of the peers that may be missing."""
    others = [other for other in range(ranks) if other != rank]
    for chosen in itertools.chain.from_iterable(itertools.combinations(others, n) for n in range(len(others) + 1)):
        yield sum(1 << other for other in chosen), frozenset(chosen)


def write_tables(folder: str, shape: Shape, mode: str) -> None:
    """Inputs and expected outputs of every rank, for the processes to load: rank<r>.npz."""
    for r in range(shape.ranks):
        alone, table = Rank(r, "cpu", 0, None, None), {}
        for step, payload in enumerate(PAYLOADS):
            tokens = group_inputs(alone, shape, step)[r]
            table |= {f"x{step}": tokens.x, f"ids{step}": tokens.topk_idx, f"weights{step}": tokens.topk_weights}
            outputs = [
                padded(shape, payload, expected_dispatch(alone, shape, payload, step, lost))
                | {"combined": expected_combine(alone, shape, payload, step, lost, mode)}
                for _, lost in subsets(r, shape.ranks)
            ]
            table |= {f"{name}{step}": np.stack([output[name] for output in outputs]) for name in outputs[0]}
        np.savez(f"{folder}/rank{r}.npz", **table)


def padded(shape: Shape, payload: Payload, received: oracle.Received) -> dict:
    """A rank's outputs as the tensors that dispatch returns, zeros after the rows."""
    rows = shape.layout().rows
    out = {
        "rows": np.zeros((shape.experts_per_rank, rows, shape.hidden), received.x[0].dtype),
        "info": np.zeros((shape.experts_per_rank, rows), np.int32),
        "valid": np.zeros((shape.experts_per_rank, rows), bool),
        "count": np.asarray(received.count, np.int32),
        "ranges": np.asarray(received.layout_range, np.int64) & 0xFFFFFFFF,
    }
    if payload is not Payload.BF16:
        out["scales"] = np.zeros((shape.experts_per_rank, rows, shape.hidden // 128), np.float32)
    for expert, n in enumerate(received.count):
        out["rows"][expert, :n], out["info"][expert, :n], out["valid"][expert, :n] = received.x[expert], received.src_info[expert], True
        if payload is not Payload.BF16:
            out["scales"][expert, :n] = received.scales[expert]
    return out


class Rounds:
    """A rank's rounds on an open buffer. Made before peers are connected, so that a graph is there when they are."""

    def __init__(self, buffer, rank: int, device: str, shape: Shape, folder: str, pairs: int):
        import torch

        self.buffer, self.device, self.shape, self.pairs = buffer, device, shape, pairs
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        self.mask = torch.zeros(shape.ranks, dtype=torch.int32, device=device)
        self.bits = torch.tensor([1 << r for r in range(shape.ranks)], dtype=torch.int64, device=device)
        entry = torch.zeros(1 << shape.ranks, dtype=torch.int64)
        for number, (bits, _) in enumerate(subsets(rank, shape.ranks)):
            entry[bits] = number
        self.entry = entry.to(device)
        factors = [2.0**-local for local in range(shape.experts_per_rank)]  # what an expert makes of a row (ep_faults)
        self.factors = torch.tensor(factors, dtype=torch.float32, device=device)[:, None, None]
        self.tables = self._load(f"{folder}/rank{rank}.npz")
        self.graph = None
        self._steps()  # loads kernels, and checks that this rank alone works
        if device == "cuda":
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._steps()
            torch.cuda.synchronize()

    def run(self) -> None:
        """One round, to its end."""
        if self.graph is None:
            return self._steps()
        import torch

        self.graph.replay()
        torch.cuda.synchronize()

    def take_wrong(self) -> int:
        wrong = int(self.wrong.item())
        self.wrong.zero_()
        return wrong

    def masked(self) -> list[int]:
        self.buffer.query_mask_buffer(self.mask)
        return [r for r, value in enumerate(bits_of(self.mask).tolist()) if value]

    def _load(self, path: str) -> list[dict]:
        import torch

        tables = []
        with np.load(path) as file:
            for step in range(len(PAYLOADS)):
                names = [name[: -len(str(step))] for name in file.files if name.endswith(str(step))]
                arrays = {name: file[f"{name}{step}"] for name in names}
                x = tensor_bf16(arrays.pop("x"), self.device)
                tables.append({name: torch.from_numpy(as_signed(a)).to(self.device) for name, a in arrays.items()} | {"x": x})
        return tables

    def _steps(self) -> None:
        for pair in range(self.pairs):
            self._pair(self.tables[pair % len(PAYLOADS)], PAYLOADS[pair % len(PAYLOADS)])

    def _pair(self, table: dict, payload: Payload) -> None:
        import torch

        layout = self.shape.layout()
        received, count, handle, _, _ = self.buffer.dispatch(
            table["x"], table["ids"], layout.max_tokens, layout.experts, **dispatch_arguments(payload)
        )
        want = self._expected(table)
        values, scales = (received, None) if payload is Payload.BF16 else received
        valid = want("valid")
        self._count(count != want("count"))
        self._count((handle[1] & 0xFFFFFFFF) != want("ranges"))
        self._count((handle[0] != want("info")) & valid)
        self._count((values.view(table["rows"].dtype) != want("rows")) & valid[..., None])
        if scales is not None:
            self._count((scales != want("scales")) & valid[..., None])
        y = values
        if scales is not None:
            y = values.float() * scales.unsqueeze(-1).expand(*scales.shape, 128).reshape(values.shape)
        combined, _, _ = self.buffer.combine((y * self.factors).bfloat16(), table["ids"], table["weights"], handle)
        self._count(combined.view(torch.int16) != self._expected(table)("combined"))

    def _expected(self, table: dict):
        self.buffer.query_mask_buffer(self.mask)
        which = self.entry.index_select(0, ((self.mask != 0) * self.bits).sum().view(1))
        return lambda name: table[name].index_select(0, which)[0]

    def _count(self, differs) -> None:
        self.wrong += differs.sum()


def as_signed(array: np.ndarray) -> np.ndarray:
    """torch compares signed integers of two bytes; bits are bits."""
    return array.view(np.int16) if array.dtype == np.uint16 else array


# ------------------------------------------------------------------------------------------- what rank processes run


def prepare(rank, shape: Shape, folder: str, pairs: int, timeout_ms: int, mode: str, tag: str) -> None:
    """Everything that takes long in a fresh process, up to a buffer that has only to be connected."""
    rank.state["buffer"] = open_buffer(rank, shape, mode, timeout_ms=timeout_ms, connect=[], store=rank.store(tag))
    rank.state["rounds"] = Rounds(rank.state["buffer"], rank.rank, rank.device, shape, folder, pairs)
    wrong = rank.state["rounds"].take_wrong()
    assert not wrong, f"{wrong} wrong values in a round of rank {rank.rank} alone"


def join(rank, ranks) -> None:
    rank.state["buffer"].connect_ranks(list(ranks))


def serve_rounds(rank, leader: int, count: int | None = None) -> Stretch:
    """Rounds until the parent wants an end (ep_faults.is_last), or `count` of them."""
    buffer, rounds, seen = rank.state["buffer"], rank.state["rounds"], Stretch()
    seen.masked_before = rounds.masked()
    usual = []
    while not is_last(rank, seen.rounds, count, leader):
        rank.progress[rank.rank] = seen.rounds
        began = time.monotonic()
        rounds.run()
        now = time.monotonic()
        faults = buffer.fault_status()
        seen.named |= {fault.rank for fault in faults}
        if not faults:
            usual.append(1000 * (now - began))
        elif seen.told_at is None:
            seen.told_at, seen.stalled_ms = now, 1000 * (now - began)
        seen.rounds += 1
    rank.progress[rank.rank] = seen.rounds
    seen.usual_ms = float(np.median(usual)) if usual else 0.0
    seen.stalled_ms = max(0.0, seen.stalled_ms - seen.usual_ms) if seen.named else 0.0
    seen.wrong = rounds.take_wrong()
    return seen


def close_rounds(rank) -> None:
    rank.state.pop("rounds", None)
    rank.state.pop("buffer").destroy()
