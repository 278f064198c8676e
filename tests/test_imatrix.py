"""llama.cpp's importance matrices, both layouts: against files written here by hand."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import gguf_writing
import numpy as np
import pytest

from edgeomni.errors import DataError
from edgeomni.quantize import imatrix

RNG = np.random.default_rng(0)
INPUTS = {"blk.0.attn_q.weight": RNG.standard_normal((50, 8)), "blk.1.ffn_down.weight": RNG.standard_normal((20, 12))}
"""What calibration saw: tokens by columns."""


def expected(name: str) -> np.ndarray:
    return np.asarray((INPUTS[name] ** 2).mean(0))


def binary(calls: int = 3) -> bytes:
    out = struct.pack("<i", len(INPUTS))
    for name, x in INPUTS.items():
        values = ((x**2).mean(0) * calls).astype("<f4").tobytes()
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, x.shape[1]) + values
    return out + struct.pack("<ii", calls, 9) + b"calib.txt"


def as_gguf(path: Path, kind: str = "imatrix", **changed: np.ndarray | None) -> Path:
    tensors = dict[str, np.ndarray | None]()
    for name, x in INPUTS.items():
        tensors[f"{name}.in_sum2"] = (x**2).sum(0, keepdims=True).astype(np.float32)
        tensors[f"{name}.counts"] = np.full((1, 1), len(x), np.float32)
    tensors |= {key.replace("__", "."): value for key, value in changed.items()}
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["calib.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, array in tensors.items():
        if array is not None:
            writer.add_tensor(name, array)
    gguf_writing.finish(writer)
    return path


def check(found: dict[str, np.ndarray]) -> None:
    assert set(found) == set(INPUTS)
    for name, values in found.items():
        assert values.dtype == np.float32 and values.shape == (INPUTS[name].shape[1],)
        np.testing.assert_allclose(values, expected(name), rtol=1e-6)


def test_both_layouts_give_the_mean_of_squares(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_bytes(binary())
    check(imatrix.read(tmp_path / "a.dat"))
    check(imatrix.read(str(as_gguf(tmp_path / "a.gguf"))))


def test_the_older_layout_ends_with_its_entries_too(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_bytes(binary()[: -(8 + len("calib.txt"))])
    check(imatrix.read(tmp_path / "a.dat"))


def test_experts_follow_one_another_and_unseen_ones_count_as_one(tmp_path: Path) -> None:
    sums = np.array([[4, 8], [5, 7], [9, 3]], np.float32)
    counts = np.array([[4], [0], [3]], np.float32)
    name = "blk__0__ffn_up_exps__weight__"
    changed: dict[str, Any] = {f"{name}in_sum2": sums, f"{name}counts": counts}
    path = as_gguf(tmp_path / "a.gguf", **changed)
    assert imatrix.read(path)["blk.0.ffn_up_exps.weight"].tolist() == [1, 2, 1, 1, 3, 1]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"kind": "model"}, "type 'model', not an importance matrix"),
        ({"blk__0__attn_q__weight__counts": None}, "only one of"),
        ({"blk__0__attn_q__weight__in_sum2": None}, "only one of"),
        ({"blk__0__attn_q__weight__counts": np.ones((3, 1), np.float32)}, "do not fit together"),
        ({"blk__0__attn_q__weight__counts": np.ones((1, 1), np.float16)}, "do not fit together"),
        ({"blk__0__attn_q__weight__in_sum2": np.full((1, 8), np.nan, np.float32)}, "no numbers"),
        ({"blk__0__attn_q__weight__in_sum2": np.full((1, 8), -1, np.float32)}, "negative"),
    ],
)
def test_what_is_wrong_with_a_gguf_is_said(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        imatrix.read(as_gguf(tmp_path / "a.gguf", **changed))


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    whole = {"a.dat": binary(), "a.gguf": as_gguf(tmp_path / "whole.gguf").read_bytes()}
    entries = len(binary()) - (8 + len("calib.txt"))
    rng = np.random.default_rng(1)
    for name, data in whole.items():
        shortest = entries if name == "a.dat" else len(data) - 32  # GGUF pads its end
        for n in range(200):
            damaged = bytearray(data)
            if n % 2:
                damaged = damaged[: int(rng.integers(shortest))]
            else:
                damaged[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            (tmp_path / name).write_bytes(damaged)
            try:
                imatrix.read(tmp_path / name)
                assert n % 2 == 0, "a file was cut short, and read all the same"
            except DataError as exc:
                assert name in str(exc)


@pytest.mark.parametrize("data", [b"", b"\0\0\0\0", b"\xff" * 40, b"not an importance matrix at all"])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.dat").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.dat"):
        imatrix.read(tmp_path / "a.dat")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.dat"):
        imatrix.read(tmp_path / "none.dat")
