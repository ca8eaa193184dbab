"""Every combination of options, on several shapes, against the oracle to the bit."""

import itertools
import os
from dataclasses import replace

import pytest
from ep_cases import STYLES, Options, Shape, group_operation, open_buffer, run_operation
from ep_fixtures import ALL
from ep_oracle import Payload

SHAPES = [
    Shape(ranks=4, experts_per_rank=2, max_tokens=8, hidden=512, topk=4),
    Shape(ranks=4, experts_per_rank=3, max_tokens=5, hidden=1024, topk=7),
    Shape(ranks=2, experts_per_rank=1, max_tokens=12, hidden=128, topk=2),
    Shape(ranks=1, experts_per_rank=4, max_tokens=6, hidden=512, topk=3),
]
MORE_SHAPES = [
    Shape(ranks=4, experts_per_rank=32, max_tokens=16, hidden=7168, topk=8),
    Shape(ranks=4, experts_per_rank=5, max_tokens=3, hidden=2560, topk=32),
    Shape(ranks=2, experts_per_rank=16, max_tokens=64, hidden=3584, topk=16),
    Shape(ranks=3, experts_per_rank=1, max_tokens=7, hidden=16384, topk=1),
]


def every_option(shape: Shape, payload: Payload, combine: str) -> list[Options]:
    product = itertools.product(STYLES, ("int32", "int64"), (False, True), (False, True), (False, True))
    listed = [Options(payload, *choice[:4], combine, choice[4]) for choice in product]
    return listed if combine == "reduced" else [options for options in listed if not options.weights_at_dispatch]


def run_every_option(rank, shape: Shape, payload: Payload, combine: str):
    buffer = open_buffer(rank, shape, combine)
    problems = []
    for number, options in enumerate(every_option(shape, payload, combine)):
        # Three inputs in turn: what an earlier operation left behind can never pass for this one's.
        operation = group_operation(shape, payload, options.combine_mode, seed=number % 3)
        problems += run_operation(buffer, rank, operation, options)
    buffer.destroy()
    return problems


@pytest.mark.parametrize("combine", ["exact", "reduced"])
@pytest.mark.parametrize("payload", Payload, ids=lambda payload: payload.value)
@pytest.mark.parametrize("shape", SHAPES + (MORE_SHAPES if ALL else []), ids=str)
def test_every_option(ranks_of, shape, payload, combine):
    if payload is Payload.FP8_UE8M0 and shape.hidden % 512:
        shape = replace(shape, hidden=512)
    results = ranks_of(shape.ranks).run(run_every_option, shape, payload, combine, timeout=300 if ALL else 60)
    problems = [problem for result in results.values() for problem in result]
    assert not problems, "\n".join(problems[:20])


def run_sizes(rank, shape: Shape, options: Options):
    """Operations whose M and hidden change from call to call on one buffer."""
    buffer = open_buffer(rank, shape, options.combine)
    problems = []
    for seed, (max_tokens, hidden) in enumerate([(8, 1024), (3, 512), (16, 256), (1, 2048), (8, 1024)]):
        operation = group_operation(
            replace(shape, max_tokens=max_tokens, hidden=hidden), options.payload, options.combine_mode, seed
        )
        problems += run_operation(buffer, rank, operation, options)
    buffer.destroy()
    return problems


@pytest.mark.parametrize("payload", [Payload.BF16, Payload.FP8_ROUND], ids=lambda payload: payload.value)
def test_tokens_and_hidden_change_between_calls(ranks_of, payload):
    results = ranks_of(4).run(run_sizes, Shape(max_tokens=16, hidden=2048), Options(payload=payload))
    assert not any(results.values()), results


@pytest.mark.parametrize("hidden", [8, 136, 264])
def test_bf16_needs_no_groups(ranks_of, hidden):
    shape = Shape(ranks=2, hidden=hidden)
    if ranks_of(2).device == "cuda":
        pytest.skip("the CUDA path takes multiples of 128")
    results = ranks_of(2).run(run_every_option, shape, Payload.BF16, "exact")
    assert not any(results.values()), results


@pytest.mark.parametrize("kind", ["empty", "hot", "plain"])
@pytest.mark.parametrize("combine", ["exact", "reduced"])
def test_extremes(ranks_of, kind, combine):
    results = ranks_of(4).run(run_kind, Shape(), kind, combine)
    assert not any(results.values()), results


def run_kind(rank, shape, kind, combine):
    buffer = open_buffer(rank, shape, combine)
    problems = []
    for seed, payload in enumerate(Payload):
        options = Options(payload=payload, combine=combine)
        operation = group_operation(shape, payload, combine, seed, kind)
        problems += run_operation(buffer, rank, operation, options)
    buffer.destroy()
    return problems


def run_index_widths(rank, shape):
    """The same operation with both widths of ids, outputs compared with each other by way of the oracle."""
    buffer = open_buffer(rank, shape)
    operation = group_operation(shape, Payload.FP8, "exact", 5)
    problems = []
    for index in ("int32", "int64", "int32"):
        problems += run_operation(buffer, rank, operation, Options(Payload.FP8, index=index))
    buffer.destroy()
    return problems


def test_both_index_widths_give_the_same(ranks_of):
    results = ranks_of(4).run(run_index_widths, Shape(topk=6))
    assert not any(results.values()), results


def run_chosen_mode(rank, shape, argument, environment):
    """The mode of sums by the argument, else by NIXL_EP_COMBINE, else by the device."""
    if environment is not None:
        os.environ["NIXL_EP_COMBINE"] = environment
    try:
        buffer = open_buffer(rank, shape, argument)
    finally:
        os.environ.pop("NIXL_EP_COMBINE", None)
    mode = argument or environment or {"cpu": "exact", "cuda": "reduced"}[rank.device]
    operation = group_operation(shape, Payload.BF16, mode, 8, "plain")
    problems = run_operation(buffer, rank, operation, Options(combine=mode))
    buffer.destroy()
    return problems


@pytest.mark.parametrize("argument", [None, "exact", "reduced"])
@pytest.mark.parametrize("environment", [None, "exact", "reduced"])
def test_the_mode_of_sums_is_chosen(ranks_of, argument, environment):
    shape = Shape(ranks=2, experts_per_rank=4, topk=6)
    exact, reduced = (group_operation(shape, Payload.BF16, mode, 8, "plain").combined[0] for mode in ("exact", "reduced"))
    assert (exact != reduced).any(), "the two modes must differ here, or this test shows nothing"
    results = ranks_of(2).run(run_chosen_mode, shape, argument, environment)
    assert not any(results.values()), results
