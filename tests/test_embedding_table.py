"""Embedding rows from files written here byte by byte: every kind of storage, padding, edges, and what is refused."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeomni.errors import BundleError, EngineError
from edgeomni.runtimes.common.embedding_table import RowTable

ROWS, WIDTH, BLOCK = 150, 20, 16
"""Two blocks a row, the second of 4 values only."""
KINDS = ["fp32", "fp16", "int8", "int8 signed", "int4", "int4 signed"]


def written(folder: Path, kind: str) -> tuple[dict[str, Any], np.ndarray]:
    """A table's manifest entry and its rows; 8 foreign bytes stand before the codes and before the scales."""
    rng = np.random.default_rng(KINDS.index(kind))
    entry: dict[str, Any] = {"file": "table.bin", "rows": ROWS, "width": WIDTH}
    if kind.startswith("fp"):
        values = rng.standard_normal((ROWS, WIDTH)).astype("<f4" if kind == "fp32" else "<f2")
        (folder / "table.bin").write_bytes(b"\xff" * 8 + values.tobytes())
        dtype = "float" if kind == "fp32" else "float16"
        return {**entry, "scheme": kind, "codes": {"dtype": dtype, "offset": 8}}, values.astype(np.float32)
    bits, signed = int(kind[3]), kind.endswith("signed")
    middle = 2 ** (bits - 1)
    codes = rng.integers(-middle + 1, middle, (ROWS, WIDTH))  # around zero
    scales = rng.uniform(0.5, 2, (ROWS, 2)).astype("<f4")
    stored = codes if signed else codes + middle
    if not signed:  # whole blocks, filled with the middle code
        stored = np.pad(stored, ((0, 0), (0, 2 * BLOCK - WIDTH)), constant_values=middle)
    raw = (stored & (2**bits - 1)).astype(np.uint8)
    if bits == 4:  # the even value in the low half of the byte
        raw = raw[:, 0::2] | raw[:, 1::2] << 4
    (folder / "table.bin").write_bytes(b"\xff" * 8 + raw.tobytes() + b"\xff" * 8 + scales.tobytes())
    entry["scheme"] = f"int{bits}{'s' * signed}_b{BLOCK}"
    entry["codes"] = {"dtype": f"{'' if signed else 'u'}int{'4' if bits == 4 and signed else '8'}", "offset": 8}
    entry["scales"] = {"dtype": "float", "offset": 16 + raw.nbytes}
    return entry, (codes * np.repeat(scales, BLOCK, axis=1)[:, :WIDTH]).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_was_stored(kind: str, tmp_path: Path) -> None:
    entry, rows = written(tmp_path, kind)
    table = RowTable(tmp_path, entry)
    assert (table.rows, table.width) == (ROWS, WIDTH)
    many = np.random.default_rng(0).integers(0, ROWS, 400)
    for ids in ([0], [ROWS - 1], [5, 3, 5], range(64), range(65), range(ROWS), many, [7] * 70, many[:65] // 40):
        got = table[np.array(ids)]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, rows[np.array(ids)], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_kept_and_written_on(kind: str, tmp_path: Path) -> None:
    entry, rows = written(tmp_path, kind)
    table = RowTable(tmp_path, entry)
    kept = table[np.arange(3)]
    kept += 1
    for i in range(4):
        np.testing.assert_allclose(table[np.arange(i, ROWS)], rows[i:], rtol=1e-6)
    np.testing.assert_allclose(kept, rows[:3] + 1, rtol=1e-6)


def test_a_table_may_begin_its_file(tmp_path: Path) -> None:
    values = np.arange(6, dtype="<f4")
    (tmp_path / "t.bin").write_bytes(values.tobytes())
    entry = {"file": "t.bin", "rows": 3, "width": 2, "scheme": "fp32", "codes": {"dtype": "float", "offset": 0}}
    assert RowTable(tmp_path, entry)[np.array([2, 0])].tolist() == [[4, 5], [0, 1]]


def test_pages_are_given_back_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row read maps much more of the file than itself; after more than 64 rows the pages go."""
    given: list[int] = []

    class Noted(mmap.mmap):
        def madvise(self, option: int, *range_: int) -> None:
            given.append(option)

    monkeypatch.setattr(mmap, "mmap", Noted)
    entry, _ = written(tmp_path, "int8")
    table = RowTable(tmp_path, entry)
    assert given == [mmap.MADV_RANDOM]
    for i, rows in enumerate((64, 1, 64, 2)):
        table[np.zeros(rows, np.int64)]
        assert given[1:] == [mmap.MADV_DONTNEED] * ((i + 1) // 2), "after rows 65 and 131"


def test_ids_without_a_row_are_named(tmp_path: Path) -> None:
    entry, _ = written(tmp_path, "int4")
    table = RowTable(tmp_path, entry)
    for bad in (-1, ROWS):
        with pytest.raises(EngineError, match=f"id {bad} has no row among the {ROWS}"):
            table[np.array([0, bad, 1])]
        with pytest.raises(EngineError, match=f"id {bad} has no row"):
            table[np.array([0] * 80 + [bad])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_its_file_does_not_hold_is_refused(kind: str, tmp_path: Path) -> None:
    entry, _ = written(tmp_path, kind)
    whole = (tmp_path / "table.bin").read_bytes()
    (tmp_path / "table.bin").write_bytes(whole[:-1])
    with pytest.raises(BundleError, match="embedding table cannot be read"):
        RowTable(tmp_path, entry)
    (tmp_path / "table.bin").write_bytes(whole)
    RowTable(tmp_path, entry)
    with pytest.raises(BundleError, match="embedding table cannot be read"):
        RowTable(tmp_path, {**entry, "codes": {**entry["codes"], "offset": -8}})


def test_an_entry_that_is_none_is_refused(tmp_path: Path) -> None:
    entry, _ = written(tmp_path, "int8")
    for wrong in (
        {"rows": None},
        {"file": "none.bin"},
        {"codes": {"offset": 8}},
        {"codes": {"dtype": "complex", "offset": 8}},
    ):
        with pytest.raises(BundleError, match="embedding table cannot be read"):
            RowTable(tmp_path, {**entry, **wrong})
