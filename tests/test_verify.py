"""`edgeomni verify`: hashes, graphs opened in processes of their own, JSON; and what an ONNX file says it reads."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from edgeomni import export
from edgeomni.bundle import MANIFEST, Bundle, describe_files
from edgeomni.cli import main, opening
from edgeomni.cli.opening import open_apart
from edgeomni.errors import BundleError, EngineError
from edgeomni.onnx_files import external_files


def verify(*args: str) -> Result:
    return CliRunner().invoke(main, ["verify", *args])


@pytest.fixture(scope="module")
def exported(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.export_bundle(tiny_model, tmp_path_factory.mktemp("verify") / "bundle", threads=1).path


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def rewrite(root: Path, path: str, change: Any) -> None:
    """Changes a graph, and makes the recorded size and hash fit."""
    model = onnx.load(root / path, load_external_data=False)
    change(model.graph)
    (root / path).write_bytes(model.SerializeToString())
    data = json.loads((root / MANIFEST).read_text())
    (entry,) = (e for c in data["components"].values() for e in c["files"] if e["path"] == path)
    now = describe_files(root, [root / path])[0]
    entry.update(size=now.size, sha256=now.sha256)
    (root / MANIFEST).write_text(json.dumps(data))


def break_split(graph: Any) -> None:
    """One output more than num_outputs says: ONNX Runtime 1.31 ends the process with SIGABRT; others may refuse it."""
    next(node for node in graph.node if node.op_type == "Split").output.append("extra")


def break_input(graph: Any) -> None:
    graph.node[0].input[0] = "nowhere"


def test_the_gate_is_replayed_without_torch(exported: Path) -> None:
    code = f"from edgeomni.cli import main; main(['verify', {str(exported)!r}, '--gate'])"
    check = f"import sys\ntry:\n    {code}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    done = subprocess.run(
        [sys.executable, "-c", check + "assert 'torch' not in sys.modules"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "llm.top1" in done.stdout and "all as recorded" in done.stdout
    report = json.loads(verify(str(exported), "--gate", "--json").stdout)
    assert report["gate"]["passed"] is True and report["gate"]["device"]["llm.top1"]["value"] == 1


def test_a_device_that_chooses_otherwise_exits_with_3(exported: Path, tmp_path: Path) -> None:
    """Another answer is recorded, hashes made to fit: this machine then chooses otherwise than the record."""
    copied = Path(shutil.copytree(exported, tmp_path / "copy"))
    path = copied / "reference.npz"
    with np.load(path) as arrays:
        changed = {name: np.roll(a, 1, axis=-1) if name == "ids.audio3" else a for name, a in arrays.items()}
    with path.open("wb") as file:
        np.savez(file, **changed)
    manifest = json.loads((copied / "bundle.json").read_text())
    manifest["reference"] |= {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (copied / "bundle.json").write_text(json.dumps(manifest))
    result = verify(str(copied), "--gate", "--json")
    assert result.exit_code == 3
    report = json.loads(result.stdout)
    assert report["passed"] is False and "device llm.top1 is" in report["error"]


def test_a_whole_bundle(exported: Path) -> None:
    result = verify(str(exported))
    assert result.exit_code == 0 and result.stdout.strip().endswith("all as recorded")
    result = verify(str(exported), "--load", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    bundle = Bundle.open(exported)
    assert report == {
        "bundle": str(exported),
        "files": 12,
        "bytes": bundle.size,
        "digest": bundle.digest,
        "graphs": dict.fromkeys(
            ("codec/codec", "encoder/encoder", "llm/audio_head", "llm/body", "llm/text_head"), "opened"
        ),
        "passed": True,
    }


def test_a_graph_that_ends_the_process_is_named(bundle: Path) -> None:
    rewrite(bundle, "encoder/encoder.onnx", break_split)
    rewrite(bundle, "llm/body.onnx", break_input)
    assert verify(str(bundle)).exit_code == 0, "its hashes fit"
    result = verify(str(bundle), "--load", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["passed"] is False and report["error"] in result.stderr
    assert report["graphs"].pop("encoder/encoder").startswith(("ended its process with SIGABRT", "was refused ("))
    assert report["graphs"].pop("llm/body").startswith("was refused (body.onnx cannot be loaded: ")
    assert set(report["graphs"].values()) == {"opened"} and len(report["graphs"]) == 3
    assert "of its graphs 2 could not be opened: encoder/encoder " in report["error"]


def test_a_process_that_dies_is_told_by_its_signal(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nkill -ABRT $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert open_apart("onnxruntime", exported / "llm" / "body.onnx") == "ended its process with SIGABRT"


def test_a_graph_that_takes_for_ever(exported: Path) -> None:
    assert open_apart("onnxruntime", exported / "llm" / "body.onnx", timeout=0.01) == "was not open after 0.01 s"


def test_engines_that_are_not_there(exported: Path) -> None:
    with pytest.raises(EngineError, match="no engine 'abacus'"):
        open_apart("abacus", exported / "llm" / "body.onnx")


def test_outcomes_in_words() -> None:
    assert opening._outcome(0, "a warning") == ""
    assert opening._outcome(-11, "") == "ended its process with SIGSEGV"
    assert opening._outcome(-99, "") == "ended its process with signal 99"
    assert opening._outcome(1, "first\nlast\n") == "was refused (last)"
    assert opening._outcome(3, "") == "was refused (exit code 3)"


def test_the_child_imports_nothing_from_the_current_directory(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('from the current directory')")
    monkeypatch.chdir(tmp_path)
    assert open_apart("onnxruntime", exported / "llm" / "text_head.onnx") == ""


def test_a_flipped_byte_in_json_too(bundle: Path) -> None:
    path = bundle / "llm" / "body.onnx.data"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    result = verify(str(bundle), "--load", "--json")
    assert result.exit_code == 1 and "graphs" not in json.loads(result.stdout), "nothing altered is opened"
    assert "llm/body.onnx.data differ(s)" in json.loads(result.stdout)["error"]


def test_an_unlisted_file_beside_the_graph_is_not_read_unhashed(bundle: Path) -> None:
    """ONNX Runtime itself refuses paths that leave the graph's folder, and nothing else."""
    shutil.copy(bundle / "llm" / "body.onnx.data", bundle / "llm" / "other.data")

    def divert(graph: Any) -> None:
        for entry in next(t for t in graph.initializer if t.external_data).external_data:
            if entry.key == "location":
                entry.value = "other.data"

    rewrite(bundle, "llm/body.onnx", divert)
    with pytest.raises(BundleError, match="graph 'llm/body' reads 'other.data', which is not among the listed files"):
        Bundle.open(bundle)


# What an ONNX file says it reads


def tensor(location: str) -> Any:
    made = numpy_helper.from_array(np.zeros(4, np.float32), location)
    made.ClearField("raw_data")
    made.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", "16")):
        entry = made.external_data.add()
        entry.key, entry.value = key, value
    return made


def graph(name: str, nodes: Any = (), initializers: Any = ()) -> Any:
    return helper.make_graph(list(nodes), name, [], [], list(initializers))


def test_external_data_is_found_wherever_onnx_can_hold_it(tmp_path: Path) -> None:
    sparse = onnx.SparseTensorProto(values=tensor("sparse values"), indices=tensor("sparse indices"))
    inner = graph("inner", [helper.make_node("Constant", [], ["c"], value=tensor("inner constant"))])
    nodes = [
        helper.make_node("Constant", [], ["a"], value=tensor("constant")),
        helper.make_node("If", ["a"], ["b"], then_branch=inner, else_branch=graph("e", (), [tensor("else")])),
        helper.make_node(
            "X", [], ["d"], many=[tensor("list 1"), tensor("list 2")], graphs=[graph("g", (), [tensor("g")])]
        ),
        helper.make_node("Constant", [], ["s"], sparse_value=onnx.SparseTensorProto(values=tensor("sparse constant"))),
        helper.make_node("Y", [], ["s2"], some=[onnx.SparseTensorProto(indices=tensor("sparse list"))]),
    ]
    top = graph("top", nodes, [tensor("initializer"), numpy_helper.from_array(np.zeros(500), "inline")])
    top.sparse_initializer.append(sparse)
    model = helper.make_model(top)
    function = helper.make_function("d", "f", [], [], [helper.make_node("C", [], [], v=tensor("function"))], [])
    function.attribute_proto.append(helper.make_attribute("w", tensor("function attribute")))
    model.functions.append(function)
    training = model.training_info.add()
    training.initialization.CopyFrom(graph("i", (), [tensor("training start")]))
    training.algorithm.CopyFrom(graph("t", (), [tensor("training")]))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    assert external_files(path) == {
        "sparse values",
        "sparse indices",
        "inner constant",
        "constant",
        "else",
        "list 1",
        "list 2",
        "g",
        "sparse constant",
        "sparse list",
        "initializer",
        "function",
        "function attribute",
        "training start",
        "training",
    }


def test_exported_graphs_read_their_own_data_only(exported: Path) -> None:
    for path in exported.rglob("*.onnx"):
        expected = {f"{path.name}.data"} if path.with_name(f"{path.name}.data").exists() else set()
        assert external_files(path) == expected, path


@pytest.mark.parametrize(
    ("raw", "locations"),
    [
        (b"", set()),
        (b"\x08\x0a\x15abcd\x19abcdefgh", set()),
        (b"\x3a\x00\x3a\x00", set()),
        (b"\xba\x80\x80\x80\x00\x00", set()),  # the key 0x3a with needless bytes
    ],
)
def test_fields_without_tensors_are_stepped_over(tmp_path: Path, raw: bytes, locations: set[str]) -> None:
    (tmp_path / "m.onnx").write_bytes(raw)
    assert external_files(tmp_path / "m.onnx") == locations


@pytest.mark.parametrize("key", [b"\x3a", b"\xba\x00", b"\xba\x80\x80\x80\x80\x01", b"\xba" + b"\x80" * 8 + b"\x02"])
@pytest.mark.parametrize("needless", [b"", b"\x80" * 8 + b"\x00", b"\x80" * 8 + b"\x7e"])
def test_of_a_key_32_bits_count_and_of_a_size_64(tmp_path: Path, key: bytes, needless: bytes) -> None:
    """As protobuf reads them: what a file reads cannot be hidden behind more bits."""
    body = graph("g", (), [tensor("w")]).SerializeToString()
    assert len(body) < 128
    size = bytes([len(body) | (0x80 if needless else 0)]) + needless
    (tmp_path / "m.onnx").write_bytes(b"\x15abcd\x19abcdefgh" + key + size + body)
    assert external_files(tmp_path / "m.onnx") == {"w"}


@pytest.mark.parametrize(
    "raw", [b"\x3a", b"\x3a\x05ab", b"\x0f", b"\x3b", b"\xff" * 11, b"\x15ab", b"\x3a\x03\x2a\x05\x00"]
)
def test_what_is_no_protobuf_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(raw)
    with pytest.raises(BundleError, match="m.onnx: is no ONNX file"):
        external_files(tmp_path / "m.onnx")
