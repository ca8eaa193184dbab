"""Random shapes, ids and values; what must hold for all of them is equality with the oracle."""

from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
from ep_cases import STYLES, Options, Shape, group_operation, open_buffer, run_operation
from ep_fixtures import ALL
from ep_oracle import Payload

RUNS = 400 if ALL else 40
CAPACITY, EXPERTS = 4, 3
LARGEST = Shape(ranks=CAPACITY, experts_per_rank=EXPERTS, max_tokens=24, hidden=2048)


@st.composite
def operations(draw):
    payload = draw(st.sampled_from(Payload))
    step, most = {Payload.BF16: (128, 16), Payload.FP8_UE8M0: (512, 4)}.get(payload, (128, 16))
    shape = Shape(
        ranks=CAPACITY,
        experts_per_rank=EXPERTS,
        max_tokens=draw(st.integers(1, LARGEST.max_tokens)),
        hidden=step * draw(st.integers(1, most)),
        topk=draw(st.integers(1, 32)),
    )
    options = Options(
        payload=payload,
        style=draw(st.sampled_from(STYLES)),
        index=draw(st.sampled_from(["int32", "int64"])),
        zero_copy=draw(st.booleans()),
        out=draw(st.booleans()),
    )
    kind = draw(st.sampled_from(["mixed", "mixed", "plain", "hot", "empty"]))
    return shape, options, kind, draw(st.integers(0, 2**31))


def run_sequence(rank, sequence, combine, joins_after):
    """The operations in order; ranks 2 and 3 join after `joins_after` of them (None: all are there from the start)."""
    present = [0, 1] if joins_after is not None else [0, 1, 2, 3]
    late = rank.rank not in present
    problems = []
    buffer = None if late else open_buffer(rank, LARGEST, combine, connect=present)
    for number, (shape, options, kind, seed) in enumerate(sequence):
        if number == joins_after:
            if late:
                buffer = open_buffer(rank, LARGEST, combine)
            else:
                buffer.connect_ranks([2, 3])
            present = [0, 1, 2, 3]
        if rank.rank in present:
            options = replace(options, combine=combine)
            operation = group_operation(shape, options.payload, options.combine_mode, seed, kind, tuple(present), CAPACITY)
            problems += [f"{shape} {kind}: {p}" for p in run_operation(buffer, rank, operation, options)]
    if buffer is not None:
        buffer.destroy()
    return problems


@hypothesis.settings(
    max_examples=RUNS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(
    sequence=st.lists(operations(), min_size=1, max_size=6),
    combine=st.sampled_from(["exact", "reduced"]),
    joins_after=st.one_of(st.none(), st.integers(0, 5)),
)
def test_any_sequence_equals_the_oracle(ranks_of, sequence, combine, joins_after):
    results = ranks_of(CAPACITY).run(run_sequence, sequence, combine, joins_after)
    problems = [problem for result in results.values() for problem in result]
    assert not problems, "\n".join(problems[:10])
