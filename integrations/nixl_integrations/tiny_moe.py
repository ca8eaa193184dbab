"""A tiny mixture-of-experts language model: in one process as the reference, or expert-parallel through either engine's adapter.

Two layers; top-2 softmax router over 16 logical experts; an expert is a gated MLP of width 512; bf16 weights from a fixed generator
state; vocabulary 512; greedy decoding. A token's successor depends on the token and its position alone.
"""
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from nixl_integrations import eplb

LOGICAL, REDUNDANT, TOPK, WIDTH, VOCABULARY, LAYERS, POSITIONS = 16, 4, 2, 512, 512, 2, 256


@dataclass(frozen=True)
class Weights:
    """All parameters of the model; bfloat16 unless said otherwise."""

    embedding: torch.Tensor  # [vocabulary, hidden]
    position: torch.Tensor   # [positions, hidden]
    router: torch.Tensor     # [layers, hidden, logical] float32
    gate: torch.Tensor       # [layers, logical, hidden, width]
    up: torch.Tensor
    down: torch.Tensor       # [layers, logical, width, hidden]
    head: torch.Tensor       # [hidden, vocabulary] float32

    @property
    def hidden(self):
        """Hidden size."""
        return self.embedding.shape[1]


def make_weights(hidden=2048, device="cpu", seed=1234):
    """The same on every rank: made on the CPU from one seed."""
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def random(*shape, scale, dtype=torch.bfloat16):
        return (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * scale).to(device, dtype)

    into, out = hidden ** -0.5, WIDTH ** -0.5
    return Weights(embedding=random(VOCABULARY, hidden, scale=1.0), position=random(POSITIONS, hidden, scale=1.0),
                   router=random(LAYERS, hidden, LOGICAL, scale=into, dtype=torch.float32),
                   gate=random(LAYERS, LOGICAL, hidden, WIDTH, scale=into), up=random(LAYERS, LOGICAL, hidden, WIDTH, scale=into),
                   down=random(LAYERS, LOGICAL, WIDTH, hidden, scale=2 * out),
                   head=random(hidden, VOCABULARY, scale=into, dtype=torch.float32))


def normed(x):
    """Root-mean-square norm over the last dimension, in float32, as bfloat16."""
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)).bfloat16()


def route(weights, layer, x):
    """(ids int64 [n, 2], softmax weights float32 [n, 2]) of logical experts."""
    scores = torch.softmax(x.float() @ weights.router[layer], dim=-1)
    chosen = scores.topk(TOPK, dim=-1)
    return chosen.indices, chosen.values / chosen.values.sum(dim=-1, keepdim=True)


def expert(weights, layer, logical, x):
    """One expert on rows [n, hidden], float32 inside."""
    x = x.float()
    inner = torch.nn.functional.silu(x @ weights.gate[layer, logical].float()) * (x @ weights.up[layer, logical].float())
    return (inner @ weights.down[layer, logical].float()).bfloat16()


class LocalExperts:
    """All experts in this process: the reference."""

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, layer, x, ids, scales):
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for k in range(TOPK):
            rows = torch.empty_like(x)
            for logical in ids[:, k].unique().tolist():
                at = ids[:, k] == logical
                rows[at] = expert(self.weights, layer, logical, x[at])
            out += scales[:, k:k + 1] * rows.float()
        return out.bfloat16()


class Placement:
    """Where the replicas of each layer's experts are, by eplb; `local` replicas a rank."""

    def __init__(self, num_ranks, num_nodes=1, algorithm=eplb.EplbAlgorithm.elasticity_aware, loads=None, local=None):
        self.num_ranks = num_ranks
        self.local = local or -(-(LOGICAL + REDUNDANT) // num_ranks)
        if loads is None:
            loads = torch.ones((1, LAYERS, LOGICAL), device="cpu")
        self.logical_of, self.places, self.counts = eplb.rebalance_experts(loads, self.local * num_ranks, self.local, 1, num_nodes, algorithm)

    def physical(self, layer, ids, first_token=0):
        """A replica for each logical id [n, k]: tokens take turns."""
        places, counts = self.places[layer].to(ids.device), self.counts[layer].to(ids.device)
        turn = torch.arange(first_token, first_token + ids.shape[0], device=ids.device)[:, None]
        return places[ids, turn % counts[ids]]

    def logical_at(self, layer, rank):
        """Logical experts of the slots of one rank."""
        return self.logical_of[layer, rank * self.local:(rank + 1) * self.local].tolist()


def run_experts(weights, layer, logical, rows, counts, scales=None):
    """The experts of one rank on their received rows [L, T, hidden]; rows past the counts are left alone."""
    out = torch.empty(rows.shape, dtype=torch.bfloat16, device=rows.device)
    for slot, count in enumerate(counts.tolist()):
        x = rows[slot, :count]
        if scales is not None:  # one scale for 128 channels
            scale = scales[slot, :count].float().repeat_interleave(128, dim=-1)
            x = (x.float() * scale).bfloat16()
        out[slot, :count] = expert(weights, layer, logical[slot], x)
    return out


class VllmExperts:
    """Experts over ranks by vLLM's prepare and finalize. quant_config None: BF16 travels; else FP8 in blocks of 128."""

    def __init__(self, weights, rank, placement, prepare_finalize, capacity_experts, fp8=False):
        self.weights, self.rank, self.placement, self.pf, self.capacity_experts = weights, rank, placement, prepare_finalize, capacity_experts
        self.quant_config = SimpleNamespace(quant_dtype=torch.float8_e4m3fn, block_shape=[128, 128]) if fp8 else None

    def __call__(self, layer, x, ids, scales):
        physical = self.placement.physical(layer, ids)
        got = self.pf.prepare(x, scales, physical, self.capacity_experts, quant_config=self.quant_config)
        y = run_experts(self.weights, layer, self.placement.logical_at(layer, self.rank), got.expert_x, got.expert_num_tokens, got.expert_x_scale)
        return self.pf.finalize(torch.empty_like(x), y, scales, physical)


class SglangExperts:
    """Experts over ranks by SGLang's dispatcher. `around(forward)` runs one layer's exchange, e.g. a FaultLoop's step."""

    def __init__(self, weights, rank, placement, dispatcher, around=lambda forward: forward()):
        self.weights, self.rank, self.placement, self.dispatcher, self.around = weights, rank, placement, dispatcher, around

    def __call__(self, layer, x, ids, scales):
        return self.around(lambda: self._exchange(layer, x, ids, scales))

    def _exchange(self, layer, x, ids, scales):
        from nixl_integrations.sglang_ep import NixlEPCombineInput

        physical = self.placement.physical(layer, ids)
        got = self.dispatcher.dispatch(x, physical, scales)
        y = run_experts(self.weights, layer, self.placement.logical_at(layer, self.rank), got.hidden_states, got.masked_m, got.hidden_states_scale)
        return self.dispatcher.combine(NixlEPCombineInput(y, got.topk_ids, scales))


def forward(weights, experts, tokens, step, trace=None):
    """Logits float32 [n, vocabulary] of the tokens (int64 [n]) at position `step`. `trace` collects (layer, input, ids, weights, output)."""
    x = weights.embedding[tokens] + weights.position[step % POSITIONS]
    for layer in range(LAYERS):
        inner = normed(x)
        ids, scales = route(weights, layer, inner)
        y = experts(layer, inner, ids, scales)
        if trace is not None:
            trace.append((layer, inner, ids, scales, y))
        x = x + y
    return normed(x).float() @ weights.head


def decode(weights, experts, tokens, num_steps, trace=None):
    """Greedy continuation: (tokens int64 [n, num_steps], margins float32 [n, num_steps] between the best two logits)."""
    out, margins = [], []
    for step in range(num_steps):
        logits = forward(weights, experts, tokens, step, trace)
        best = logits.topk(2, dim=-1)
        tokens = best.indices[:, 0]
        out.append(tokens)
        margins.append(best.values[:, 0] - best.values[:, 1])
    return torch.stack(out, dim=1), torch.stack(margins, dim=1)


def prompts(rank, num_tokens):
    """Each rank's own first tokens."""
    return (torch.arange(num_tokens) * 37 + rank * 101 + 5) % VOCABULARY


def calc_diff(x, y):
    """Distance of two tensors, 0 for equal ones."""
    x, y = x.double() + 1, y.double() + 1
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())
