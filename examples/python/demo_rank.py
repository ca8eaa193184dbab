"""One rank of the demo: serves operations while they are granted, and checks every token it gets."""

from __future__ import annotations

import os
import threading
import time
import traceback
from dataclasses import dataclass, field

import numpy as np

EXPERTS_PER_RANK = 4
TOPK = 4
INPUTS = 3  # different inputs, in turn, so that nothing left over can pass for new
BIN_S = 0.1
BINS = 3000


@dataclass(frozen=True)
class Settings:
    rank: int
    capacity: int
    device: str
    store_port: int
    timeout_ms: int
    tokens: int
    hidden: int


class Board:
    """Memory shared by all processes: what is granted, what is done, and tokens over time, which outlive a killed rank."""

    def __init__(self, context, ranks: int):
        self.ranks = ranks
        self.began = time.monotonic()
        self._granted = context.RawArray("q", 2)  # operations granted; 1 when no more will be
        self._done = context.RawArray("q", ranks)
        self._checked = context.RawArray("q", ranks)
        self._wrong = context.RawArray("q", ranks)
        self._tokens = context.RawArray("q", ranks * BINS)

    def reset(self) -> None:
        self._granted[0] = self._granted[1] = 0
        self._done[:] = [0] * self.ranks

    def grant(self, operations: int) -> None:
        self._granted[0] = max(self._granted[0], operations)

    def end_phase(self) -> None:
        self._granted[1] = 1

    def may_run(self, operation: int) -> bool:
        """Waits until the operation is granted; False once the phase ends before it. All ranks get the same answer."""
        while True:
            over = self._granted[1]  # read first: after it nothing more is granted
            if operation < self._granted[0]:
                return True
            if over:
                return False
            time.sleep(0.001)

    def done(self, rank: int) -> int:
        return self._done[rank]

    def add(self, rank: int, operation: int, tokens: int, wrong: int) -> None:
        self._done[rank] = operation + 1
        self._checked[rank] += tokens
        self._wrong[rank] += wrong
        self._tokens[rank * BINS + min(BINS - 1, int((time.monotonic() - self.began) / BIN_S))] += tokens

    def totals(self) -> tuple[int, int]:
        """(tokens checked, tokens wrong) of all ranks so far."""
        return sum(self._checked), sum(self._wrong)

    def rates(self, rank: int) -> np.ndarray:
        """Tokens a second in each bin of BIN_S seconds since the beginning."""
        return np.array(self._tokens[rank * BINS : (rank + 1) * BINS]) / BIN_S


@dataclass
class Record:
    """What a rank saw in one phase."""

    dispatch_s: list = field(default_factory=list)
    combine_s: list = field(default_factory=list)
    dispatch_bytes: int = 0
    combine_bytes: int = 0
    tokens: int = 0
    wrong: int = 0
    first_wrong: str = ""
    named: set = field(default_factory=set)  # ranks named by fault_status()
    told_at: float | None = None  # when the operation that named the first one had returned


@dataclass(frozen=True)
class Expected:
    """One rank's right answers for one input, as bit patterns: rows by expert, and its combined tokens."""

    rows: list
    sources: list
    combined: np.ndarray


class Rank:
    def __init__(self, settings: Settings, board: Board):
        import ep_oracle
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self.oracle, self.torch = ep_oracle, torch
        self.settings, self.board = settings, board
        self.store = dist.TCPStore("127.0.0.1", settings.store_port, is_master=False, wait_for_workers=False)
        self.layout = ep_oracle.Layout(settings.capacity, EXPERTS_PER_RANK, settings.tokens, settings.hidden)
        self.buffer = None

    # ------------------------------------------------------------------------------------------------ membership

    def open(self, ranks) -> None:
        import nixl_ep

        s, layout = self.settings, self.layout
        self.buffer = nixl_ep.Buffer(
            rank=s.rank,
            explicitly_destroy=True,
            tcp_store_group=self.store,
            timeout_ms=s.timeout_ms,
            device=s.device,
            combine="exact",
        )
        size = nixl_ep.Buffer.get_rdma_size_hint(layout.max_tokens, layout.hidden, layout.ranks, layout.experts)
        self.buffer.update_memory_buffers(layout.ranks, EXPERTS_PER_RANK, size)
        self.buffer.connect_ranks(list(ranks))

    def connect(self, ranks) -> None:
        self.buffer.connect_ranks(list(ranks))

    def disconnect(self, ranks) -> None:
        self.buffer.disconnect_ranks(list(ranks))

    def close(self) -> None:
        self.buffer.destroy()

    # ------------------------------------------------------------------------------------------- inputs, answers

    def prepare(self, phase: int, present, killed: int | None) -> None:
        """Everyone's inputs of this phase, and the right answers with and without the rank that will be killed.

        All of it now: while a rank computes answers its peers would wait for it.
        """
        self.present, self.expected = list(present), {}
        self.inputs = [self._tokens(phase, number) for number in range(INPUTS)]
        for number in range(INPUTS):
            self._expect(number, frozenset())
            if killed is not None and killed != self.settings.rank:
                self._expect(number, frozenset([killed]))
        self.tensors = [self._tensors(group[self.settings.rank]) for group in self.inputs]

    def _tokens(self, phase: int, number: int) -> dict:
        experts = [rank * EXPERTS_PER_RANK + local for rank in self.present for local in range(EXPERTS_PER_RANK)]
        group = {}
        for rank in self.present:
            rng = np.random.default_rng([phase, number, rank])
            shape = (self.layout.max_tokens, self.layout.hidden)
            order = np.argsort(rng.random((shape[0], len(experts))), axis=1)[:, :TOPK]
            group[rank] = self.oracle.Tokens(
                self.oracle.bf16_from_float(rng.standard_normal(shape, np.float32)),
                np.array(experts)[order],
                rng.random((shape[0], TOPK), np.float32),
            )
        return group

    def _expect(self, number: int, lost: frozenset) -> Expected:
        """The answers for one input when the ranks of `lost` give and take nothing."""
        if (number, lost) not in self.expected:
            oracle, me = self.oracle, self.settings.rank
            links = oracle.all_links(self.layout.ranks, self.present)
            links[me, list(lost)] = False
            received = oracle.dispatch(self.layout, self.inputs[number], oracle.Payload.BF16, links)
            y = {rank: [self._expert(e, rows) for e, rows in enumerate(out.x)] for rank, out in received.items()}
            combined = oracle.combine(self.layout, self.inputs[number], received, y, "exact", links)[me]
            self.expected[number, lost] = Expected(received[me].x, received[me].src_info, combined)
        return self.expected[number, lost]

    def _expert(self, local: int, rows) -> np.ndarray:
        """The demo's expert: its rows times 1, 2, 4 or 8, which is exact."""
        return self.oracle.bf16_from_float(self.oracle.float_from_bf16(rows) * np.float32(2**local))

    def _tensors(self, tokens):
        torch, device = self.torch, self.settings.device
        x = torch.from_numpy(tokens.x.view(np.int16)).view(torch.bfloat16).to(device)
        return x, torch.from_numpy(tokens.topk_idx).to(device), torch.from_numpy(tokens.topk_weights).to(device)

    # ---------------------------------------------------------------------------------------------------- serving

    def serve(self, phase: int) -> Record:
        record, lost, operation = Record(), set(), 0
        gains = self.torch.tensor([2.0**e for e in range(EXPERTS_PER_RANK)], device=self.settings.device).view(-1, 1, 1)
        while self.board.may_run(operation):
            wrong = self._operate(operation % INPUTS, record, lost, gains)
            record.tokens += self.layout.max_tokens
            record.wrong += wrong
            self.board.add(self.settings.rank, operation, self.layout.max_tokens, wrong)
            operation += 1
        return record

    def _operate(self, number: int, record: Record, lost: set, gains) -> int:
        """One dispatch, the experts, one combine; returns how many tokens came out wrong."""
        x, ids, weights = self.tensors[number]
        began = time.perf_counter()
        recv_x, count, handle, _, _ = self.buffer.dispatch(
            x, ids, self.layout.max_tokens, self.layout.experts, use_fp8=False
        )
        record.dispatch_s.append(self._elapsed(began))
        self._note_faults(record, lost)
        counts = count.tolist()
        wrong = self._wrong_rows(self._expect(number, frozenset(lost)), recv_x, counts, record)
        most = max(counts)
        y = recv_x.clone()
        y[:, :most] = (recv_x[:, :most].float() * gains).bfloat16()
        began = time.perf_counter()
        out, _, _ = self.buffer.combine(y, ids, weights, handle)
        record.combine_s.append(self._elapsed(began))
        self._note_faults(record, lost)
        wrong += self._wrong_tokens(self._expect(number, frozenset(lost)).combined, out, record)
        record.dispatch_bytes += ids.numel() * self.layout.hidden * 2
        record.combine_bytes += ids.numel() * self.layout.hidden * 2
        return wrong

    def _elapsed(self, began: float) -> float:
        if self.settings.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter() - began

    def _note_faults(self, record: Record, lost: set) -> None:
        now = time.monotonic()
        for fault in self.buffer.fault_status():
            record.named.add(fault.rank)
            record.told_at = record.told_at or now
            lost.add(fault.rank)

    def _bits(self, tensor) -> np.ndarray:
        return tensor.cpu().contiguous().view(self.torch.int16).numpy().view(np.uint16)

    def _wrong_rows(self, expected: Expected, recv_x, counts, record) -> int:
        wrong = 0
        for expert, rows in enumerate(expected.rows):
            if counts[expert] != len(rows):
                record.first_wrong = record.first_wrong or f"expert {expert}: {counts[expert]} rows, not {len(rows)}"
                wrong += max(1, abs(counts[expert] - len(rows)))
                continue
            got = self._bits(recv_x[expert, : len(rows)])
            wrong += int((got != rows).any(axis=1).sum())
        return wrong

    def _wrong_tokens(self, expected: np.ndarray, out, record) -> int:
        wrong = np.flatnonzero((self._bits(out) != expected).any(axis=1))
        if len(wrong):
            record.first_wrong = record.first_wrong or f"combined token {wrong[0]}"
        return len(wrong)


def main(settings: Settings, board: Board, connection) -> None:
    """Body of a rank process: does what the connection asks; ends with it, or when the parent does."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "error")  # a masked peer is a warning; the demo shows it its own way
    if settings.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = str(settings.rank)
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    rank = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            rank = rank or Rank(settings, board)
            answer = getattr(rank, method)(*arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        connection.send(answer)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
