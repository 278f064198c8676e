"""Bundles: what is written is read; what is damaged, foreign or escaping is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import small_bundle, small_spec

from edgeomni import bundle as bundle_module
from edgeomni.bundle import MANIFEST, Bundle, write_manifest
from edgeomni.errors import BundleError

Data = dict[str, Any]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "bundle", small_spec())


def edit(root: Path, change: Callable[[Data], object]) -> None:
    data = json.loads((root / MANIFEST).read_text())
    change(data)
    (root / MANIFEST).write_text(json.dumps(data))


def llm(data: Data) -> Data:
    part: Data = data["components"]["llm"]
    return part


def test_what_is_written_is_read(root: Path) -> None:
    bundle = Bundle.open(root)
    assert bundle.spec == small_spec() and bundle.manifest.components["llm"].precision == "int8"
    assert bundle.manifest.to_dict() == json.loads(json.dumps(bundle.manifest.to_dict()), object_hook=_tuples)
    assert bundle.size == sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and p.name != MANIFEST)
    assert bundle.digest == Bundle.open(root).digest
    assert bundle.file("llm/body.onnx") == root / "llm" / "body.onnx"


def _tuples(found: Data) -> Data:
    """JSON has no tuples; these three keys of the spec are some."""
    return {k: tuple(v) if k in ("vq_strides", "tasks", "stop_words") else v for k, v in found.items()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


def link_out(root: Path) -> None:
    (root / "llm" / "body.onnx").rename(root.parent / "elsewhere.onnx")
    (root / "llm" / "body.onnx").symlink_to(root.parent / "elsewhere.onnx")


def link_loop(root: Path) -> None:
    (root / "llm" / "body.onnx").unlink()
    (root / "llm" / "body.onnx").symlink_to(root / "llm" / "body.onnx")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def relist(root: Path, path: str) -> None:
    """Records the file as it is now."""

    def change(data: Data) -> None:
        for component in data["components"].values():
            for entry in component["files"]:
                if entry["path"] == path:
                    raw = (root / path).read_bytes()
                    entry.update(size=len(raw), sha256=hashlib.sha256(raw).hexdigest())

    edit(root, change)


def write(path: str, raw: bytes) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / path).write_bytes(raw)
        relist(root, path)

    return damage


def external(location: bytes) -> bytes:
    """A graph (7) with one initializer (5), whose external data (13) lies at `location` (a key and a value)."""
    entry = b"\x0a\x08location" + b"\x12" + bytes([len(location)]) + location
    tensor = b"\x6a" + bytes([len(entry)]) + entry
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    return b"\x3a" + bytes([len(graph)]) + graph


Damage = Callable[[Path], object]
FILES: dict[str, tuple[Damage, str]] = {
    "flipped byte": (lambda r: flip(r / "llm" / "body.onnx"), r"llm/body.onnx differ.*SHA-256"),
    "missing file": (lambda r: (r / "codec" / "codec.onnx").unlink(), "codec/codec.onnx is missing"),
    "truncated file": (lambda r: (r / "llm" / "body.onnx").write_bytes(b"x"), "body.onnx has 1 bytes instead of 150"),
    "link out": (link_out, "'llm/body.onnx' leaves the bundle through a link"),
    "link loop": (link_loop, "llm/body.onnx.* (cannot be reached|is missing)"),
    "named pipe as table": (lambda r: pipe(r / "llm" / "text.bin"), "llm/text.bin is no regular file"),
    "directory as graph": (lambda r: folder(r / "llm" / "body.onnx"), "llm/body.onnx is no regular file"),
    "named pipe as manifest": (lambda r: pipe(r / MANIFEST), "bundle.json"),
    "no manifest": (lambda r: (r / MANIFEST).unlink(), "has no bundle.json"),
    "external data above": (
        write("llm/body.onnx", external(b"../x")),
        "graph 'llm/body' reads '../x', which is not among",
    ),
    "external data absolute": (write("llm/body.onnx", external(b"/etc/passwd")), "reads '/etc/passwd'"),
    "external data of another": (write("llm/body.onnx", external(b"../codec/codec.onnx")), "reads '../codec/codec.o"),
    "external data unlisted": (write("llm/body.onnx", external(b"w.data")), "reads 'w.data', which is not among"),
    "no ONNX file": (write("llm/body.onnx", b"\x0f" * 20), "llm/body.onnx: is no ONNX file"),
}
DOCUMENT: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{", "not valid JSON"),
    "empty": (b"  \n", "the file is empty"),
    "a list": (b"[]", "holds a list instead of an object"),
    "Latin-1": (b'{"schema": "\xff"}', "is not UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "UTF-16": ("{}".encode("utf-16"), "byte order mark"),
    "deep": (b'{"a":' * 100_000, "nested too deeply"),
    "deep, but parsed": (b'{"a":' * 100 + b"1" + b"}" * 100, "nested more than 64 levels"),
    "repeated key": (b'{"schema": "2.0", "schema": "3.0"}', "the key 'schema' stands twice"),
    "NaN": (b'{"schema": NaN}', r"\$\.schema: must be a finite number"),
    "overflow": (b'{"schema": 1e999}', r"\$\.schema: must be a finite number"),
    "huge": (b'{"schema": 1' + b"0" * 30 + b"}", r"\$\.schema: must be a number below 2\*\*63"),
    "gigantic": (b'{"schema": 1' + b"0" * 5000 + b"}", "not valid JSON"),
    "surrogate": (b'{"schema": "\\ud800"}', "half of a character"),
    "surrogate as key": (b'{"\\ud800": 1}', "a key holds half of a character"),
}
KEYS: dict[str, tuple[Callable[[Data], object], str]] = {
    "newer major": (lambda d: d.update(schema="3.0"), r"\$\.schema: .*'3.0' is newer than 2.2.*update EdgeOmni"),
    "newer integer": (lambda d: d.update(schema=99), r"schema version 99 is newer than 2.2.*; update EdgeOmni"),
    "older": (lambda d: d.update(schema=1), r"schema version 1 is older than 2.2.*export the checkpoint again"),
    "no schema": (lambda d: d.pop("schema"), r"\$\.schema: schema version None is not of the form '2.2'"),
    "true": (lambda d: d.update(schema=True), "schema version True is not of the form"),
    "odd schema": (lambda d: d.update(schema="2.0\n"), "is not of the form"),
    "unlisted file": (lambda d: llm(d)["files"].pop(2), "llm, '(graph|table) .*is not among the listed files"),
    "table elsewhere": (
        lambda d: llm(d)["meta"]["tables"]["text"].update(file="tokenizer.json"),
        "llm, 'table text': tokenizer.json is not among the listed files",
    ),
    "table above": (
        lambda d: llm(d)["meta"]["tables"]["text"].update(file="../t.bin"),
        r"\$\.components\.llm\.meta\.tables\.text: path '../t.bin' leaves",
    ),
    "table too small": (
        lambda d: llm(d)["meta"]["tables"]["text"].update(rows=3),
        r"\$\.components\.llm\.meta\.tables\.text: 3 rows of 16, but the spec has 100 of 16",
    ),
    "dot dot": (lambda d: d["tokenizer"].update(path="../t.json"), r"\$\.tokenizer: path '../t.json' leaves"),
    "absolute": (lambda d: d["tokenizer"].update(path="/etc/passwd"), "'/etc/passwd' leaves"),
    "backslash": (lambda d: d["tokenizer"].update(path="..\\t.json"), "leaves the bundle"),
    "drive": (lambda d: d["tokenizer"].update(path="c:t.json"), "leaves the bundle"),
    "two spellings": (lambda d: d["tokenizer"].update(path="./tokenizer.json"), "not spelled as the path of a file"),
    "no path": (lambda d: d["tokenizer"].update(path=""), "not spelled as the path of a file"),
    "escape code in a path": (lambda d: d["tokenizer"].update(path="a\x1b[2J"), r"path 'a\\x1b\[2J' is not spelled"),
    "long path": (lambda d: d["tokenizer"].update(path="a" * 1025), "not spelled as the path of a file"),
    "negative version": (lambda d: d.update(schema=-1), "schema version -1 is not of the form"),
    "no graph of the TTS adapter": (
        lambda d: d["spec"].update(tts_layers=1),
        r"\$\.components\.llm\.graphs: tts missing",
    ),
    "NUL": (lambda d: d["tokenizer"].update(path="a\0b"), "not spelled as the path of a file"),
    "wrong type": (lambda d: llm(d)["graphs"]["body"].update(path=3), r"\$\.components\.llm\.graphs\.body\.path: "),
    "graph as text": (lambda d: llm(d)["graphs"].update(body="x"), r"\$\.components\.llm\.graphs\.body: Expected"),
    "odd key": (lambda d: llm(d)["graphs"].update({"\x1b[2J": 1}), r"\$\.components\.llm\.graphs\['\\x1b\[2J'\]: "),
    "unknown key": (lambda d: llm(d).update(colour=1), r"bundle.json: unknown key\(s\) \$\.components\.llm\.colour"),
    "unknown key in meta": (lambda d: llm(d)["meta"].update(colour=1), r"key\(s\) \$\.components\.llm\.meta\.colour"),
    "component gone": (lambda d: d["components"].pop("codec"), r"\$\.components: codec missing"),
    "component more": (lambda d: d["components"].update(ear=llm(d)), "unknown component"),
    "components swapped": (lambda d: d["components"].update(codec=llm(d)), r"\$\.components\.codec\.name: is 'llm'"),
    "head gone": (lambda d: llm(d)["graphs"].pop("text_head"), r"\$\.components\.llm\.graphs: text_head missing"),
    "other suffix": (lambda d: llm(d)["graphs"]["body"].update(path="llm/text.bin"), "must end in .onnx"),
    "spec broken": (lambda d: d["spec"].pop("body"), r"\$\.spec: .*missing required field `body`"),
    "layers": (lambda d: d["spec"]["body"].update(layers=10**9), r"\$\.spec\.body: body.layers is 1000000000, but no"),
    "vocabulary": (lambda d: d["spec"]["layout"].update(text_vocab=10**12), r"\$\.spec\.layout: layout.text_vocab is"),
    "gate": (lambda d: d.update(gate=[]), r"\$\.gate: Expected `object`, got `array`"),
    "licence": (lambda d: d["licences"].update(llm=3), r"\$\.licences\.llm: Expected `str`, got `int`"),
    "weights": (lambda d: d["provenance"].update(weights="odd"), r"\$\.provenance\.weights: "),
    "provenance": (lambda d: d["provenance"].update(more=[1]), r"\$\.provenance\.more: must be a text or a number"),
    "two hashes": (
        lambda d: llm(d)["files"].append({**llm(d)["files"][0], "size": 1}),
        "is listed with two sizes or hashes",
    ),
    "no hash": (lambda d: d["tokenizer"].update(sha256="0" * 63), r"\$\.tokenizer\.sha256: "),
    "codec state": (
        lambda d: d["components"]["codec"]["meta"]["states"].append(
            {"name": "s", "shape": [1 << 20, 1 << 20], "dtype": "float32"}
        ),
        r"\$\.components\.codec\.meta\.states\[0\]: has the shape",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_files_are_named(case: str, root: Path) -> None:
    damage, message = FILES[case]
    damage(root)
    with pytest.raises(BundleError, match=message):
        Bundle.open(root)


@pytest.mark.parametrize("case", DOCUMENT)
def test_what_is_no_manifest_is_refused(case: str, root: Path) -> None:
    raw, message = DOCUMENT[case]
    (root / MANIFEST).write_bytes(raw)
    with pytest.raises(BundleError, match=f"bundle.json: .*{message}"):
        Bundle.open(root, hashes=False)


@pytest.mark.parametrize("case", KEYS)
def test_wrong_keys_are_named(case: str, root: Path) -> None:
    change, message = KEYS[case]
    edit(root, change)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(root, hashes=False)
    assert str(root) in str(caught.value) and str(caught.value).isprintable()


def test_a_manifest_too_large_is_not_read(root: Path) -> None:
    with (root / MANIFEST).open("ab") as f:
        f.truncate((1 << 26) + 1)
    with pytest.raises(BundleError, match="larger than 67108864 bytes"):
        Bundle.open(root)


def test_keys_of_a_newer_minor_version_are_told_once_and_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(data: Data) -> None:
        data.update(schema="2.9", mood="good")
        llm(data).update(colour=1)

    before = Bundle.open(root).manifest.to_dict()
    edit(root, change)
    with caplog.at_level("WARNING", "edgeomni"):
        after = Bundle.open(root).manifest.to_dict()
    assert {**after, "schema": before["schema"]} == before
    (record,) = caplog.records
    assert "bundle.json" in record.getMessage() and "$.mood, $.components.llm.colour" in record.getMessage()


def test_only_listed_files_are_given_out(root: Path) -> None:
    bundle = Bundle.open(root)
    (root / "llm" / "notes.txt").write_text("unhashed")
    for path in ("llm/notes.txt", MANIFEST, "../cache", "/etc/passwd", "llm", "llm/../tokenizer.json", "a\0b"):
        with pytest.raises(BundleError, match="not among the listed files"):
            bundle.file(path)


def test_external_data_beside_the_graph_is_fine_when_it_is_listed(root: Path) -> None:
    write("llm/body.onnx", external(b"text.bin"))(root)
    Bundle.open(root, hashes=True)


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed from now on."""
    names: list[str] = []
    original = bundle_module.sha256

    def told(path: Path) -> str:
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(bundle_module, "sha256", told)
    return names


def test_hashes_are_remembered_but_verify_looks_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "SETTLED_S", 0.0)
    names = hashed(monkeypatch)
    Bundle.open(root)
    assert len(names) == 8
    bundle = Bundle.open(root)
    assert len(names) == 8, "remembered"
    Bundle.open(root, hashes=True)
    bundle.verify()
    assert len(names) == 24


@pytest.mark.parametrize("path", ["llm/body.onnx", MANIFEST])
def test_restoring_the_time_of_modification_fools_nobody(
    root: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(bundle_module, "SETTLED_S", 0.0)
    Bundle.open(root)
    names = hashed(monkeypatch)
    stat = (root / path).stat()
    while (root / path).stat().st_ctime_ns == stat.st_ctime_ns:  # until the file system's clock ticks
        (root / path).write_bytes((root / path).read_bytes())
        os.utime(root / path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    Bundle.open(root)
    assert len(names) == 8


def test_what_changed_a_moment_ago_is_not_remembered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change within the same tick of the clock would leave no trace."""
    Bundle.open(root)
    names = hashed(monkeypatch)
    Bundle.open(root)
    assert len(names) == 8


def test_one_file_that_changed_a_moment_ago_is_enough(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old = root / "tokenizer.json", (root / "llm" / "body.onnx").stat().st_ctime
    while new.stat().st_ctime == old:  # until the file system's clock ticks
        new.write_bytes(new.read_bytes())
    now = max(path.stat().st_ctime for path in root.rglob("*"))
    monkeypatch.setattr(bundle_module, "SETTLED_S", (now - old) / 2)
    monkeypatch.setattr(time, "time", lambda: now)
    assert not bundle_module._settled(Bundle.open(root, hashes=False))
    monkeypatch.setattr(time, "time", lambda: now + 1)
    assert bundle_module._settled(Bundle.open(root, hashes=False))


def test_both_ways_to_hash_agree(tmp_path: Path) -> None:
    raw = bytes(range(256)) * 5000  # more than is read at once
    (tmp_path / "file").write_bytes(raw)
    with (tmp_path / "file").open("rb") as f:
        assert (
            bundle_module._sha256_slow(f) == hashlib.sha256(raw).hexdigest() == bundle_module.sha256(tmp_path / "file")
        )


def test_a_manifest_is_written_sorted_and_holds_no_nan(root: Path) -> None:
    manifest = Bundle.open(root).manifest
    keys = list(json.loads((root / MANIFEST).read_text()))
    assert keys == sorted(keys)
    manifest.gate = {"value": float("nan")}
    with pytest.raises(BundleError, match="not finite"):
        write_manifest(root, manifest)
    Bundle.open(root)


def test_a_file_that_changes_while_it_is_verified(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "SETTLED_S", 0.0)
    original = bundle_module.sha256

    def slow(path: Path) -> str:
        digest = original(path)
        if path.name == "body.onnx":
            path.rename(path.with_name("old"))
            path.write_bytes(b"x" * 150)
        return digest

    monkeypatch.setattr(bundle_module, "sha256", slow)
    with pytest.raises(BundleError, match="changed while they were verified"):
        Bundle.open(root)
    monkeypatch.setattr(bundle_module, "sha256", original)
    with pytest.raises(BundleError, match=r"llm/body.onnx differ"):
        Bundle.open(root)
