"""Descriptor conversion (7.1), strided tables (7.3) and the low-level lists (9)."""
import pickle

import nixl
import numpy as np
import pytest
from agents import agent

torch = pytest.importorskip("torch")
XFER, REG, REMOTE = nixl.nixlXferDList, nixl.nixlRegDList, nixl.nixlRemoteDList


@pytest.fixture(scope="module")
def one():
    return agent("descs")


@pytest.fixture(params=["get_xfer_descs", "get_reg_descs"])
def getter(request, one):
    return getattr(one, request.param)


def rows(descs):
    return [tuple(row[:3]) for row in descs]


def test_same_list_passes_and_the_other_does_not(one):
    xfer, reg = XFER(nixl.DRAM_SEG, [(1, 2, 3)]), REG(nixl.DRAM_SEG, [(1, 2, 3, "m")])
    assert one.get_xfer_descs(xfer) is xfer and one.get_reg_descs(reg) is reg
    assert one.get_xfer_descs(reg) is None and one.get_reg_descs(xfer) is None


def test_tuples(one):
    assert rows(one.get_xfer_descs([(1, 2, 3), (4, 5, 6)], "DRAM")) == [(1, 2, 3), (4, 5, 6)]
    assert list(one.get_reg_descs([(1, 2, 3, "a"), (4, 5, 6, b"\0b")], "FILE")) == [(1, 2, 3, b"a"), (4, 5, 6, b"\0b")]
    assert list(one.get_reg_descs([(1, 2, 3)], "DRAM")) == [(1, 2, 3, b"")]
    assert one.get_reg_descs([(1, 2, 3)], "cuda").getType() == nixl.VRAM_SEG


def test_refusals(getter):
    assert getter([(1, 2, 3)]) is None
    assert getter([(1, 2)], "DRAM") is None
    assert getter([(1, 2, 3, 4, 5)], "DRAM") is None
    assert getter([(1, 2, 3, 4)]) is None
    assert getter(np.zeros((2, 4), np.uint64), "DRAM") is None
    assert getter(np.zeros((2, 3), np.uint64)) is None
    assert getter(np.zeros(3, np.uint64), "DRAM") is None
    assert getter(torch.zeros(4, 4).t()) is None
    assert getter("text") is None and getter([1, 2], "DRAM") is None
    with pytest.raises(IndexError):
        getter([], "DRAM")
    with pytest.raises(KeyError):
        getter([(1, 2, 3)], "RAM")
    with pytest.raises(KeyError):
        getter(np.zeros((2, 3), np.uint64), "dram")


def test_four_integers_are_no_registration(one):
    assert one.get_xfer_descs([(1, 2, 3, 4)], "DRAM") is None
    with pytest.raises(KeyError):
        one.get_reg_descs([(1, 2, 3, 4)], "RAM")


@pytest.mark.parametrize("dtype", [np.uint64, np.int64])
def test_arrays(getter, dtype):
    table = np.arange(12, dtype=dtype).reshape(4, 3)
    assert rows(getter(table, "DRAM")) == [tuple(row) for row in table.tolist()]
    assert getter(np.zeros((0, 3), dtype), "DRAM").descCount() == 0


@pytest.mark.parametrize("bad", [np.zeros((2, 3), np.uint32), np.zeros((2, 3), np.float64), np.zeros((3, 2), np.uint64).T,
                                 np.zeros((4, 3), np.uint64)[::2]])
def test_arrays_of_other_dtype_or_layout(getter, bad):
    with pytest.raises(ValueError):
        getter(bad, "DRAM")


def test_tensors(getter):
    a, b = torch.zeros(10, dtype=torch.float64), torch.zeros(3, dtype=torch.uint8)
    assert rows(getter(a)) == [(a.data_ptr(), 80, 0)]
    assert rows(getter([a, b])) == [(a.data_ptr(), 80, 0), (b.data_ptr(), 3, 0)]
    assert getter([a, torch.zeros(4, 4).t()]) is None
    for stranger in ((1, 2, 3), None):
        assert getter([a, stranger]) is None


def test_numpy_buffers(getter):
    a, b = np.zeros(10), np.zeros((3, 3), np.uint8)
    assert rows(getter([a, b])) == [(a.ctypes.data, 80, 0), (b.ctypes.data, 9, 0)]
    assert getter([a, np.zeros((3, 3)).T]) is None


def test_device_arrays_by_interface(getter):
    class OnDevice:
        __cuda_array_interface__ = {"shape": (4, 2), "typestr": "<f4", "data": (12345, False), "strides": None, "version": 3}

        def __dlpack_device__(self):
            return (2, 1)

    descs = getter(OnDevice())
    assert descs.getType() == nixl.VRAM_SEG and rows(descs) == [(12345, 32, 1)]


def test_remote_descs(one):
    descs = one.get_remote_descs([(1, 2, 3, "peer")], "DRAM")
    assert list(descs) == [(1, 2, 3, "peer")] and one.get_remote_descs(descs) is descs
    assert pickle.loads(pickle.dumps(descs)) == descs


def test_strided_tables(one):
    memory = np.zeros(4096, np.uint8)
    one.register_memory([memory])
    base = memory.ctypes.data
    table = np.array([(base, 16, 0, 64, 10), (base + 2048, 32, 0, 32, 3)], np.uint64)
    descs = one.get_xfer_descs(table, "DRAM")
    assert descs.descCount() == 13
    assert descs[9] == (base + 9 * 64, 16, 0) and descs[10] == (base + 2048, 32, 0) and descs[-1] == (base + 2048 + 64, 32, 0)
    one.prep_xfer_dlist("", table, "DRAM").release()
    with pytest.raises(ValueError):
        one.prep_xfer_dlist("", table)
    for column, value in ((4, 0), (3, 8)):
        bad = table.copy()
        bad[0, column] = value
        with pytest.raises(ValueError):
            one.prep_xfer_dlist("", bad, "DRAM")


def test_list_behaviour():
    descs = XFER(nixl.DRAM_SEG, [(30, 5, 0), (10, 50, 1), (10, 50, 1)])
    assert list(descs) == [(30, 5, 0), (10, 50, 1), (10, 50, 1)] and len(descs) == 3
    assert descs.index((10, 50, 1)) == 1
    assert descs != None and not descs == 7 and None not in [descs]  # noqa: E711
    with pytest.raises(nixl.nixlNotFoundError):
        descs.index((1, 1, 1))
    for index in (3, -4):
        with pytest.raises(IndexError):
            descs[index]
        with pytest.raises(IndexError):
            descs.remDesc(index)
    descs.remDesc(0)
    descs.append((7, 8, 9))
    descs[0] = (1, 2, 3)
    assert list(descs) == [(1, 2, 3), (10, 50, 1), (7, 8, 9)]
    descs.clear()
    assert descs.isEmpty() and descs.descCount() == 0 and bool(descs) and bool(XFER(nixl.DRAM_SEG))
    for bad, error in ((5, TypeError), ([1, 2, 3], TypeError), ((1, 2), ValueError), ((1, -2, 3), (ValueError, OverflowError))):
        with pytest.raises(error):
            descs.addDesc(bad)


def test_constructors():
    assert list(XFER(nixl.DRAM_SEG, 2)) == [(0, 0, 0)] * 2
    assert list(XFER(nixl.DRAM_SEG, [(1, 2, 3)], False)) == [(1, 2, 3)]
    assert REG(nixl.DRAM_SEG, False).isEmpty()
    for first in ("mem", "type"):
        assert list(XFER(**{first: nixl.DRAM_SEG}, init_size=1)) == [(0, 0, 0)] and XFER(**{first: nixl.DRAM_SEG}).isEmpty()
        assert list(XFER(**{first: nixl.DRAM_SEG}, descs=[(1, 2, 3)])) == [(1, 2, 3)]
    assert list(REG(nixl.OBJ_SEG, descs=[(1, 2, 3, "k")])) == [(1, 2, 3, b"k")]
    assert nixl.nixlRemoteDList(nixl.DRAM_SEG, init_size=2).descCount() == 2
    assert list(REG(nixl.DRAM_SEG, np.ones((1, 3), np.int64))) == [(1, 1, 1, b"")]
    with pytest.raises(ValueError):
        XFER(nixl.DRAM_SEG, np.zeros((2, 2), np.uint64))
    assert REG(nixl.OBJ_SEG, [(1, 2, 3, "k")]) != REG(nixl.OBJ_SEG, [(1, 2, 3, "j")])
    assert REG(nixl.OBJ_SEG, [(1, 2, 3, "k")]).index((1, 2, 3, "other")) == 0
    assert list(REG(nixl.OBJ_SEG, [(1, 2, 3, "k")]).trim()) == [(1, 2, 3)]
    XFER(nixl.DRAM_SEG, 1).print()


@pytest.mark.parametrize("table", [np.random.default_rng(1).integers(0, 1 << 62, (1000, 3)), np.ones((5, 3), np.int64)])
@pytest.mark.parametrize("kind", [XFER, REG])
def test_pickle(kind, table):
    descs = kind(nixl.VRAM_SEG, table)
    packed = pickle.dumps(descs)
    again = pickle.loads(packed)
    assert again == descs and type(again) is kind and again.getType() == nixl.VRAM_SEG
    assert len(packed) <= 25 * len(table) + 64


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_short_lists_are_small(protocol):
    for count in (0, 1, 2, 7):
        for kind in (XFER, REG):
            descs = kind(nixl.DRAM_SEG, [(0x7F0000000000 + 4096 * i, 100 + i, i) for i in range(count)])
            packed = pickle.dumps(descs, protocol)
            assert pickle.loads(packed) == descs
            assert protocol < pickle.DEFAULT_PROTOCOL or len(packed) <= 25 * count + 64


def test_serialized_descs(one):
    for descs in (XFER(nixl.DRAM_SEG, [(1, 2, 3)]), REG(nixl.FILE_SEG, [(1, 2, 3, b"\0m")]), None, [(1, 2, "x")], {"a": b"b"}):
        assert one.deserialize_descs(one.get_serialized_descs(descs)) == descs
    mixed = [XFER(nixl.DRAM_SEG, [(1, 2, 3)]), None]
    assert one.deserialize_descs(one.get_serialized_descs(mixed)) == mixed
    plain = {"a": bytearray(b"x"), "b": {1, 2.5}, "c": frozenset([1j])}
    assert one.deserialize_descs(one.get_serialized_descs(plain)) == plain

    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    with pytest.raises(pickle.UnpicklingError):
        one.deserialize_descs(pickle.dumps(Evil()))
    packed = one.get_serialized_descs(XFER(nixl.DRAM_SEG, np.arange(30).reshape(10, 3)))
    for cut in range(8, len(packed)):
        with pytest.raises(nixl.nixlMismatchError):
            one.deserialize_descs(packed[:cut])
