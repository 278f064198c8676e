"""The reader of GGUF files of any origin: against what the gguf package writes, and headers broken by hand."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import gguf_writing
import numpy as np
import pytest

from edgeomni.errors import CheckpointError, DataError
from edgeomni.gguf_files import is_gguf, read

NUMBERS: dict[str, Any] = {
    "uint8": 200,
    "int8": -100,
    "uint16": 60_000,
    "int16": -30_000,
    "uint32": 4_000_000_000,
    "int32": -2_000_000_000,
    "uint64": 2**63 + 1,
    "int64": -(2**62),
    "float32": 0.25,
    "float64": 1e300,
    "bool": True,
}
ROWS = np.arange(-48, 48, dtype=np.float32).reshape(3, 32) / 7


def written(path: Path, alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "some")
    for name, value in NUMBERS.items():
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    writer.add_string("a.text", "Wörter 🙂")
    writer.add_array("a.words", ["one", "", "drei"])
    writer.add_array("a.whole", [1, -2, 3])
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_array("a.switches", [True, False])
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_tensor("rows", ROWS)
    writer.add_tensor("half", ROWS.astype(np.float16))
    writer.add_tensor(
        "packed", gguf.quantize(ROWS, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("last", np.array([7.0], np.float32))
    gguf_writing.finish(writer)
    return path


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_everything_is_read_as_it_was_written(tmp_path: Path, alignment: int | None) -> None:
    file = read(written(tmp_path / "a.gguf", alignment), CheckpointError)
    for name, value in NUMBERS.items():
        assert file.metadata[f"a.{name}"] == value and type(file.metadata[f"a.{name}"]) is type(value), name
    assert file.metadata["a.text"] == "Wörter 🙂" and file.metadata["a.words"] == ["one", "", "drei"]
    for name, values in {"whole": [1, -2, 3], "floats": [0.5, 1.5], "switches": [True, False]}.items():
        assert file.metadata[f"a.{name}"].tolist() == values
    assert [(t.name, t.shape, t.type) for t in file.tensors.values()] == [
        ("rows", (3, 32), "F32"),
        ("half", (3, 32), "F16"),
        ("packed", (3, 32), "Q8_0"),
        ("last", (1,), "F32"),
    ]
    assert np.array_equal(file.rows("rows"), ROWS)
    assert np.array_equal(file.rows("half"), ROWS.astype(np.float16).astype(np.float32))
    assert np.abs(file.rows("packed") - ROWS).max() <= np.abs(ROWS).max() / 254 * 1.1  # scales are float16
    assert file.rows("last").tolist() == [7.0]
    for name in file.tensors:
        assert file.rows(name).dtype == np.float32 and file.rows(name).flags.writeable


def test_values_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    file = read(written(tmp_path / "a.gguf"), DataError)
    assert file.get("a.uint8", int) == 200 and file.get("a.bool", bool) is True
    assert file.get("gone", int) is None and file.get("gone", int, 5) == 5
    for key, kind in (("a.text", int), ("a.bool", int), ("a.float32", int), ("a.uint8", str), ("a.uint8", bool)):
        with pytest.raises(DataError, match=key):
            file.get(key, kind)


def test_types_that_cannot_be_dequantized_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    data = bytearray(written(path).read_bytes())
    place = data.index(b"packed") + 6 + 4 + 16
    assert struct.unpack_from("<I", data, place) == (8,)
    struct.pack_into("<I", data, place, int(gguf.GGMLQuantizationType.Q8_1))  # also blocks of 32
    path.write_bytes(data + bytes(64))
    with pytest.raises(CheckpointError, match="packed is of the type Q8_1"):
        read(path, CheckpointError).rows("packed")


def header(version: int = 3, tensors: int = 0, pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + rest


def pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def info(name: str = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name.encode() + sizes + struct.pack("<IQ", kind, offset)


ALIGNED = pair("general.alignment", 4, struct.pack("<I", 24))
BROKEN = {
    "empty": (b"", "no GGUF"),
    "another file": (b"PK\3\4" + bytes(40), "does not begin as one"),
    "version 1": (header(1), "of version 1"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "other byte order"),
    "a header cut short": (header()[:20], "ends within its header"),
    "a key twice": (header(pairs=2, rest=pair("a", 4, bytes(4)) * 2), "'a' is given twice"),
    "an unknown type": (header(pairs=1, rest=pair("a", 13, bytes(8))), "unknown type 13"),
    "arrays of arrays": (header(pairs=1, rest=pair("a", 9, struct.pack("<IQ", 9, 0))), "array is of the type 9"),
    "more pairs than bytes": (header(pairs=2**60), f"announces {2**60} entries"),
    "more tensors than bytes": (header(tensors=2**60), f"announces {2**60} entries"),
    "an endless array": (header(pairs=1, rest=pair("a", 9, struct.pack("<IQ", 0, 2**62))), "entries, and ends"),
    "endless texts": (header(pairs=1, rest=pair("a", 9, struct.pack("<IQ", 8, 2**62))), "entries, and ends"),
    "an endless text": (header(pairs=1, rest=pair("a", 8, struct.pack("<Q", 2**63))), "entries, and ends"),
    "an odd alignment": (header(pairs=1, rest=ALIGNED), "alignment is 24"),
    "five dimensions": (header(tensors=1, rest=info(shape=(1,) * 5)), "5 dimensions"),
    "an unknown tensor type": (header(tensors=1, rest=info(kind=999)), "999"),
    "rows that blocks do not divide": (header(tensors=1, rest=info(shape=(31,), kind=8)), "rows of 31"),
    "a tensor twice": (header(tensors=2, rest=info() * 2 + bytes(512)), "'t' is given twice"),
    "a tensor beyond the end": (header(tensors=1, rest=info(offset=2**40)), "ends before the tensor 't'"),
    "a tensor larger than memory": (header(tensors=1, rest=info(shape=(2**40, 2**40))), "ends before the tensor 't'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, case: str) -> None:
    data, told = BROKEN[case]
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "a.gguf", CheckpointError)
    assert told in str(caught.value) and "a.gguf" in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read(path, DataError)


def test_a_file_is_told_by_its_name_or_its_beginning(tmp_path: Path) -> None:
    written(tmp_path / "blob")
    (tmp_path / "empty.GGUF").write_bytes(b"")
    (tmp_path / "text").write_text("GGU")
    assert is_gguf(tmp_path / "blob") and is_gguf(tmp_path / "empty.GGUF")
    assert not is_gguf(tmp_path / "text") and not is_gguf(tmp_path) and not is_gguf(tmp_path / "none.gguf")
