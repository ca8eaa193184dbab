"""The reference against cases worked out by hand, and its conversions against torch's."""

import ep_oracle as oracle
import numpy as np
import pytest
from ep_oracle import Layout, Payload, Tokens

NAN, INF = float("nan"), float("inf")


def bits(*values):
    return oracle.bf16_from_float(np.array(values, np.float32))


def row(value, hidden=128):
    return bits(value).repeat(hidden)


def tokens(values, ids, weights=None):
    ids = np.array(ids, np.int64)
    weights = np.ones(ids.shape) if weights is None else np.array(weights).reshape(ids.shape)
    x = np.array([row(value) for value in values], np.uint16).reshape(len(values), 128)
    return Tokens(x, ids, weights.astype(np.float32))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, 0x3F80),
        (-2.0, 0xC000),
        (1 + 2**-8, 0x3F80),  # half way, down to even
        (1 + 3 * 2**-8, 0x3F82),  # half way, up to even
        (1 + 2**-8 + 2**-20, 0x3F81),
        (3.4e38, 0x7F80),  # rounds beyond the largest
        (INF, 0x7F80),
        (-0.0, 0x8000),
        (NAN, 0x7FC0),
    ],
)
def test_bf16_rounds_to_even(value, expected):
    assert bits(value)[0] == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 0x00),
        (-0.0, 0x80),
        (1.0, 0x38),
        (-1.5, 0xBC),
        (448.0, 0x7E),
        (449.0, 0x7E),
        (1e30, 0x7E),
        (-INF, 0xFE),
        (17.0, 0x58),  # 16 and 18 are neighbours; 16 is even
        (19.0, 0x5A),  # 18 and 20; 20 is even
        (2**-6, 0x08),
        (2**-9, 0x01),
        (2**-10, 0x00),  # half of the smallest, to even
        (3 * 2**-10, 0x02),
        (15 * 2**-10, 0x08),  # the largest subnormal's upper half rounds into the normals
        (NAN, 0x7F),
    ],
)
def test_e4m3_rounds_to_even_and_saturates(value, expected):
    assert oracle.e4m3_from_float([value])[0] == expected


def test_e4m3_decodes_what_it_encodes():
    codes = np.arange(256, dtype=np.uint8)
    again = oracle.e4m3_from_float(oracle.float_from_e4m3(codes))
    assert (oracle.canonical_e4m3(again) == oracle.canonical_e4m3(codes)).all()
    assert oracle.float_from_e4m3([0x7E])[0] == 448 and oracle.float_from_e4m3([0x01])[0] == 2**-9


def test_conversions_agree_with_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    patterns = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([patterns, np.float32(448) * np.linspace(-1, 1, 100_001, dtype=np.float32)])
    ours = oracle.canonical_bf16(oracle.bf16_from_float(values))
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (ours == oracle.canonical_bf16(theirs)).all()
    finite = values[np.abs(values) <= 448]  # beyond, torch does not saturate
    theirs = torch.from_numpy(finite).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert (oracle.e4m3_from_float(finite) == theirs).all()


def test_fp8_gives_small_integers_back_exactly():
    x = np.stack([row(value) for value in range(-256, 257) if bits(value) == bits(float(value))])
    values, scales = oracle.quantize(x, Payload.FP8)
    back = oracle.dequantize(values, scales, Payload.FP8)
    assert (oracle.bf16_from_float(back) == x).all()


def test_default_scale_is_amax_over_448():
    values, scales = oracle.quantize(row(-3.0)[None], Payload.FP8)
    assert scales.tolist() == [[float(np.float32(3) * (np.float32(1) / np.float32(448)))]]
    assert set(values.ravel()) == {0xFE}


def test_smallest_amax():
    values, scales = oracle.quantize(row(0.0)[None], Payload.FP8)
    assert scales[0, 0] == np.float32(1e-4) * (np.float32(1) / np.float32(448)) and not values.any()


@pytest.mark.parametrize(("value", "exponent"), [(448.0, 0), (450.0, 1), (224.0, -1), (1.0, -8), (0.0, -22)])
def test_rounded_scale_is_the_next_power_of_two(value, exponent):
    x = row(value, 512)[None]
    _, scales = oracle.quantize(x, Payload.FP8_ROUND)
    assert scales.tolist() == [[2.0**exponent] * 4]
    _, packed = oracle.quantize(x, Payload.FP8_UE8M0)
    assert packed.shape == (1, 1) and packed.dtype == np.int32
    assert packed.view(np.uint8).tolist() == [[exponent + 127] * 4]


def test_packed_exponents_are_little_endian():
    x = np.concatenate([row(448.0 * 2**p) for p in range(4)])[None]
    _, packed = oracle.quantize(x, Payload.FP8_UE8M0)
    assert packed[0, 0] == 127 | 128 << 8 | 129 << 16 | -(256 - 130) << 24


def test_nan_does_not_reach_the_scale_and_infinity_does():
    x = row(2.0)[None].copy()
    x[0, 5] = bits(NAN)[0]
    values, scales = oracle.quantize(x, Payload.FP8)
    assert scales[0, 0] == np.float32(2) * (np.float32(1) / np.float32(448))
    assert oracle.canonical_e4m3(values)[0, 5] == 0x7F and values[0, 6] == 0x7E
    x[0, 7] = bits(-INF)[0]
    values, scales = oracle.quantize(x, Payload.FP8)  # the factor is 0: finite becomes 0, infinite NaN
    assert np.isinf(scales[0, 0]) and values[0, 6] == 0
    assert oracle.canonical_e4m3(values)[0, [5, 7]].tolist() == [0x7F, 0x7F]
    values, scales = oracle.quantize(x, Payload.FP8_ROUND)  # the factor is 2^-128: infinite saturates
    assert np.isinf(scales[0, 0]) and values[0, [6, 7]].tolist() == [0, 0xFE]


def test_dispatch_orders_by_source_token_and_place():
    layout = Layout(ranks=2, experts_per_rank=2, max_tokens=4, hidden=128)
    group = {0: tokens([1, 2], [[3, 0], [2, 3]]), 1: tokens([5, 6], [[3, 3], [-7, 1]])}
    out = oracle.dispatch(layout, group, Payload.BF16)
    assert out[1].count.tolist() == [1, 4]
    assert out[1].source[1].tolist() == [0, 0, 1, 1]
    assert out[1].src_info[1].tolist() == [0, 1, 0, 0]
    assert out[1].slot[1].tolist() == [0, 1, 0, 1]
    assert (out[1].x[1] == np.stack([row(1), row(2), row(5), row(5)])).all()
    assert out[1].layout_range.tolist() == [[1, 1 << 32], [2, 2 << 32 | 2]]
    assert out[0].count.tolist() == [1, 1] and out[0].src_info[1].tolist() == [1]


def test_dispatch_skips_absent_masked_and_foreign_ids():
    layout = Layout(ranks=3, experts_per_rank=1, max_tokens=2, hidden=128)
    group = {0: tokens([1], [[1, 2, 3, -1]]), 2: tokens([4], [[0, 1, 2, 99]])}
    out = oracle.dispatch(layout, group, Payload.FP8)
    assert [out[r].count.tolist() for r in (0, 2)] == [[1], [2]]
    links = oracle.all_links(3, [0, 2])
    links[2, 0] = False
    out = oracle.dispatch(layout, group, Payload.FP8, links)
    assert [out[r].count.tolist() for r in (0, 2)] == [[1], [1]]
    assert out[2].layout_range.tolist() == [[0, 0, 1]]


def test_dispatch_without_tokens_and_with_too_many_copies():
    layout = Layout(ranks=2, experts_per_rank=1, max_tokens=2, hidden=128)
    group = {0: Tokens(np.zeros((0, 128), np.uint16), np.zeros((0, 2), np.int64), np.zeros((0, 2), np.float32))}
    group[1] = tokens([1, 2], [[0, 0], [0, 0]])
    out = oracle.dispatch(layout, group, Payload.FP8_ROUND)
    assert out[0].count.tolist() == [2] and out[0].src_info[0].tolist() == [0, 0]
    assert out[1].count.tolist() == [0] and out[1].x[0].shape == (0, 128)


def combined(group, layout, y, mode, links=None):
    return oracle.combine(layout, group, oracle.dispatch(layout, group, Payload.BF16), y, mode, links)


def test_combine_weighs_every_copy_and_leaves_zero_for_nothing():
    layout = Layout(ranks=2, experts_per_rank=1, max_tokens=2, hidden=128)
    group = {0: tokens([1, 1], [[0, 1, 1], [-1, -1, 9]], [[2, 3, 0.5], [1, 1, 1]]), 1: tokens([1], [[-1, -1, -1]])}
    y = {0: [np.stack([row(10)])], 1: [np.stack([row(100), row(1000)])]}
    for mode in ("exact", "reduced"):
        out = combined(group, layout, y, mode)
        assert (out[0] == np.stack([row(820), row(0)])).all() and not out[1].any()
        links = oracle.all_links(2, [0])
        assert (combined(group, layout, y, mode, links)[0] == np.stack([row(20), row(0)])).all()


def test_reduced_rounds_a_rank_before_it_adds():
    layout = Layout(ranks=2, experts_per_rank=2, max_tokens=1, hidden=128)
    group = {0: tokens([1], [[2, 3, 0]]), 1: tokens([], np.zeros((0, 3)))}
    y = {0: [np.stack([row(-256)]), np.zeros((0, 128), np.uint16)], 1: [np.stack([row(256)]), np.stack([row(1)])]}
    assert (combined(group, layout, y, "exact")[0] == row(1)).all()
    assert (combined(group, layout, y, "reduced")[0] == row(0)).all()  # 257 is no bfloat16: 256


def test_exact_adds_in_order_of_place():
    layout = Layout(ranks=1, experts_per_rank=3, max_tokens=1, hidden=128)
    big, small = 2.0**25, 1.0
    for order, result in ([big, small, -big], 0.0), ([big, -big, small], 1.0):
        group = {0: tokens([1], [[0, 1, 2]])}
        y = {0: [np.stack([row(value)]) for value in order]}
        assert (combined(group, layout, y, "exact")[0] == row(result)).all()


def test_no_fused_multiply_add():
    layout = Layout(ranks=1, experts_per_rank=2, max_tokens=1, hidden=128)
    weight = float(np.float32(1) / np.float32(3))
    group = {0: tokens([1], [[0, 1]], [[weight, 1.0]])}
    y = {0: [np.stack([row(3.0)]), np.stack([row(-1.0)])]}
    assert not combined(group, layout, y, "exact")[0].any()  # fused it would be 2^-25


@pytest.mark.parametrize(
    ("args", "total"),
    [((128, 7168, 8 * 32), 1_908_412_544), ((256, 7168, 128), 1_908_410_496), ((64, 4096, 8), 17_039_744)],
)
def test_size_hint_bound(args, total):
    assert oracle.size_hint_bound(*args) == total


def test_dispatch_layout_counts_a_token_once_a_rank():
    per_rank, per_node, per_expert, in_rank = oracle.dispatch_layout([[0, 1, -1], [3, 3, 0]], experts=4, ranks=2)
    assert per_rank.tolist() == [2, 1] and per_node is None and per_expert.tolist() == [2, 1, 0, 2]
    assert in_rank.tolist() == [[True, False], [True, True]]


def test_calc_diff():
    assert oracle.calc_diff([1, 2], [1, 2]) == 0 and oracle.calc_diff([1], [2]) > 0.01
