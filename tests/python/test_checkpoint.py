"""The checkpoint module: every dtype and layout back bit for bit, and nothing half done after an error."""

import pathlib
import random
import resource
import subprocess
import sys

import pytest

pytest.importorskip("nixl")
torch = pytest.importorskip("torch")
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "integrations"))

import nixl  # noqa: E402
from nixl_integrations import checkpoint  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool, torch.complex64]


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    named = {}
    for i, dtype in enumerate(DTYPES):
        for shape in [(), (0, 4), (3, 5), (1 << 16,), (1000, 33)]:
            size = torch.empty(shape, dtype=dtype).numel() * torch.empty((), dtype=dtype).element_size()
            raw = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
            named[f"layer{i}.{len(named)}"] = raw.view(dtype).reshape(shape)
    named["transposed"] = torch.rand(300, 200, generator=generator).t()
    named["conjugate"] = torch.rand(30, dtype=torch.complex64, generator=generator).conj()
    named["negated"] = torch.rand(30, dtype=torch.complex64, generator=generator).conj().imag
    named["sliced"] = torch.rand(100, 100, generator=generator)[::2, 10:50]
    return named


def same(a, b):
    def raw(t):
        return t.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)

    return all(torch.equal(raw(a[name]), raw(b[name])) for name in a)


def blank(like):
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def test_round_trip(tmp_path):
    model, seen = tensors(), []
    facts = checkpoint.save(model, tmp_path / "m", progress=lambda *p: seen.append(p))
    assert facts["backend"] == "POSIX" and seen[-1][0] == facts["bytes"] - sum_of_gaps(tmp_path / "m.json")
    copy = blank(model)
    checkpoint.load(copy, tmp_path / "m")
    assert same(model, copy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.json"]


def sum_of_gaps(index):
    import json

    index = json.loads(index.read_text())
    return index["bytes"] - sum(entry["bytes"] for entry in index["tensors"])


def test_module(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.BatchNorm1d(200), torch.nn.Linear(200, 10))
    other = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.BatchNorm1d(200), torch.nn.Linear(200, 10))
    checkpoint.save(model, tmp_path / "m", "POSIX")
    checkpoint.load(other, tmp_path / "m", "POSIX")
    assert same(model.state_dict(), other.state_dict())


def test_overwriting_replaces_both_files(tmp_path):
    checkpoint.save(tensors(1), tmp_path / "m")
    model = tensors(2)
    checkpoint.save(model, tmp_path / "m")
    copy = blank(model)
    checkpoint.load(copy, tmp_path / "m")
    assert same(model, copy)


def test_disk_full_leaves_the_old_one(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted")
    try:
        old = {"w": torch.rand(1000)}
        checkpoint.save(old, small / "m")
        with pytest.raises(nixl.nixlBackendError, match="ENOSPC"):
            checkpoint.save({"w": torch.rand(1 << 20)}, small / "m")
        assert sorted(p.name for p in small.iterdir()) == ["m", "m.json"]
        copy = blank(old)
        checkpoint.load(copy, small / "m")
        assert same(old, copy)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_an_index_that_does_not_fit_leaves_the_old_one(tmp_path):
    """The index of many small tensors is longer than they are: it is what a limit meets."""
    old = {"w": torch.rand(100)}
    checkpoint.save(old, tmp_path / "m")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save({f"w{i}": torch.rand(1) for i in range(200)}, tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.json"]
    copy = blank(old)
    checkpoint.load(copy, tmp_path / "m")
    assert same(old, copy)


def test_damage_and_mismatch_are_told(tmp_path):
    model = {"a": torch.rand(1000), "b": torch.arange(10)}
    checkpoint.save(model, tmp_path / "m")
    with open(tmp_path / "m", "r+b") as f:
        f.seek(17)
        byte = f.read(1)
        f.seek(17)
        f.write(bytes([byte[0] ^ 1]))
    with pytest.raises(checkpoint.CheckpointError, match="'a' is damaged"):
        checkpoint.load(blank(model), tmp_path / "m")
    with pytest.raises(checkpoint.CheckpointError, match=r"'b' is torch.int64 \[10\], wanted torch.int32 \[10\]"):
        checkpoint.load({"b": torch.zeros(10, dtype=torch.int32)}, tmp_path / "m")
    with pytest.raises(checkpoint.CheckpointError, match="no tensor 'c'"):
        checkpoint.load({"c": torch.zeros(1)}, tmp_path / "m")
    with pytest.raises(checkpoint.CheckpointError, match="no complete checkpoint"):
        checkpoint.load(model, tmp_path / "other")
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match="is no index"):
        checkpoint.load(model, tmp_path / "m")
    with open(tmp_path / "m.json", "w") as f:
        f.write('{"format": 99}')
    with pytest.raises(checkpoint.CheckpointError, match="format 99"):
        checkpoint.load(model, tmp_path / "m")


def test_a_damaged_index_is_told_or_harmless(tmp_path):
    """Random changes of the index: an error of its own kind, or the right bytes; never another exception, never wrong bytes."""
    model = {"a": torch.rand(1000), "b": torch.arange(10), "c": torch.zeros(0)}
    checkpoint.save(model, tmp_path / "m")
    index, points, told = tmp_path / "m.json", random.Random(11), 0
    good = index.read_bytes()
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(points.randint(1, 3)):
            at = points.randrange(len(bad))
            way = points.randrange(3)
            if way == 0:
                bad[at] = points.choice(b'0123456789"{}[]:,-.eEtfn') if points.random() < 0.8 else points.randrange(256)
            elif way == 1:
                del bad[at : at + points.randint(1, 4)]
            else:
                bad[at:at] = points.choice([b"-", b"9999999999999999999", b"[" * 50, b"null", b'"', b"0", b"1e400"])
        index.write_bytes(bad)
        into = blank(model)
        try:
            checkpoint.load(into, tmp_path / "m")
        except (checkpoint.CheckpointError, nixl.nixlError):
            told += 1
        else:
            assert same(model, into), bytes(bad)
    assert told > 50


@pytest.mark.parametrize("field", ("name", "dtype", "shape", "offset", "bytes", "crc32"))
def test_an_index_without_a_field_is_told(tmp_path, field):
    checkpoint.save({"a": torch.rand(10)}, tmp_path / "m")
    index = tmp_path / "m.json"
    index.write_text(index.read_text().replace(f'"{field}"', f'"{field}x"'))
    with pytest.raises(checkpoint.CheckpointError, match=f"is no index of a checkpoint: .*{field}"):
        checkpoint.load({"a": torch.zeros(10)}, tmp_path / "m")


def test_truncated_data(tmp_path):
    model = {"a": torch.rand(100_000)}
    checkpoint.save(model, tmp_path / "m")
    with open(tmp_path / "m", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(nixl.nixlBackendError, match="the file ends at offset 1000"):
        checkpoint.load(blank(model), tmp_path / "m")


def test_missing_backends_are_passed_over_with_a_reason(tmp_path, caplog, monkeypatch):
    if nixl.plugin_report()["GDS"]["available"]:
        pytest.skip("GDS works here, so nothing is passed over")
    monkeypatch.setattr(checkpoint.log.parent, "propagate", True)
    with caplog.at_level("INFO", logger="nixl.checkpoint"):
        checkpoint.save({"a": torch.zeros(10)}, tmp_path / "m")
    assert "GDS is not used: " in caplog.text and "libcu" in caplog.text
    with pytest.raises(nixl.nixlNotFoundError, match="GDS"):
        checkpoint.save({"a": torch.zeros(10)}, tmp_path / "m2", "GDS")
    assert not (tmp_path / "m2").exists()


def test_objects():
    pytest.importorskip("moto", reason="moto is not installed: no S3 server to test against")
    from object_servers import S3Server

    with S3Server() as server:
        model, params = tensors(3), server.params()
        assert not checkpoint.exists("ck/model", "OBJ", backend_params=params)
        checkpoint.save(model, "ck/model", "OBJ", backend_params=params)
        assert checkpoint.exists("ck/model", "OBJ", backend_params=params)
        copy = blank(model)
        checkpoint.load(copy, "ck/model", "OBJ", backend_params=params)
        assert same(model, copy)
