"""Libraries that are too old for some bundles, or not there: named, and never taken for damage of the bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from engine_bundles import bare_bundle
from onnx import TensorProto, helper

from edgeomni.bundle import Bundle
from edgeomni.cli import doctor, main, opening
from edgeomni.cli.opening import NOT_HERE, open_apart
from edgeomni.combine import combine
from edgeomni.engines import release
from edgeomni.errors import EngineError, EngineUnavailable
from edgeomni.onnx_files import NEW_OPSET_NEEDS, OLD_OPSET, opset
from edgeomni.runtimes.common import trial
from edgeomni.runtimes.onnxruntime.sessions import SessionFactory
from edgeomni.runtimes.tensorrt import library, problem, sources
from edgeomni.runtimes.tensorrt.device import Facts

NO_OTHERS: Mapping[str, int] = {}


def graph(path: Path, version: int, operator: str = "Identity", domains: Mapping[str, int] = NO_OTHERS) -> Path:
    """A file with one operator, in that version of ONNX's own operators."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    made = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "g", value[:1], value[1:])
    opsets = [helper.make_opsetid(name, number) for name, number in domains.items()]
    path.write_bytes(
        helper.make_model(
            made, opset_imports=[*opsets, helper.make_opsetid("", version)], ir_version=10
        ).SerializeToString()
    )
    return path


def test_the_opset_of_a_file(tmp_path: Path) -> None:
    assert opset(graph(tmp_path / "a.onnx", 24)) == 24
    assert opset(graph(tmp_path / "b.onnx", 21, domains={"com.microsoft": 90})) == 21
    assert opset(graph(tmp_path / "c.onnx", 300)) == 300
    named = onnx.load(tmp_path / "a.onnx")
    named.opset_import[0].domain = "ai.onnx"
    (tmp_path / "d.onnx").write_bytes(named.SerializeToString())
    assert opset(tmp_path / "d.onnx") == 24
    (tmp_path / "none.onnx").write_bytes(b"")
    (tmp_path / "text.onnx").write_bytes(b"no graph at all" * 9)
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "a.onnx").read_bytes()[:-1])
    (tmp_path / "odd.onnx").write_bytes(b"\x42\x02\x1d\x00")
    for name in ("none.onnx", "text.onnx", "cut.onnx", "odd.onnx", "missing.onnx"):
        assert opset(tmp_path / name) == 0, name


def test_what_the_exporters_write(tiny_model: Any, tmp_path: Path) -> None:
    """Bundles in the default flavour open with every ONNX Runtime that EdgeOmni takes, in the portable one not."""
    from edgeomni.exporters import exporter_of, options_of

    portable = options_of("onnx", {"flavour": "portable"})
    (tmp_path / "portable").mkdir()
    (tmp_path / "ort").mkdir()
    ours = exporter_of("onnx").export(tiny_model, "llm", tmp_path / "portable", "fp32", portable)
    assert opset(tmp_path / "portable" / ours.graphs["body"].path) == OLD_OPSET + 1
    plain = exporter_of("onnx").export(tiny_model, "llm", tmp_path / "ort", "fp32", options_of("onnx", {}))
    assert {opset(tmp_path / "ort" / g.path) for g in plain.graphs.values()} <= set(range(1, OLD_OPSET + 1))


@pytest.mark.parametrize("version", ["1.23.2", "1.24.4"])
def test_a_graph_that_needs_a_newer_onnxruntime_says_so(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opset 999 is refused by every ONNX Runtime, as 24 is by an old one."""
    newer, older = graph(tmp_path / "new.onnx", 999), graph(tmp_path / "old.onnx", OLD_OPSET, "NoSuchOperator")
    with pytest.raises(EngineError) as caught:
        SessionFactory(1).open(newer)
    assert not isinstance(caught.value, EngineUnavailable) and "new.onnx cannot be loaded" in str(caught.value)
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(
        EngineUnavailable, match=rf"opset 999, .*need ONNX Runtime 1\.25 or newer, and this is {version}"
    ) as found:
        SessionFactory(1).open(newer)
    assert found.value.kind == "version" and "Python" not in str(found.value)
    monkeypatch.setattr("sys.version_info", (3, 10, 13))
    with pytest.raises(EngineUnavailable, match=r"none for Python 3\.10: take Python 3\.11 or newer"):
        SessionFactory(1).open(newer)
    with pytest.raises(EngineError, match=r"old\.onnx cannot be loaded") as caught:
        SessionFactory(1).open(older)
    assert not isinstance(caught.value, EngineUnavailable)


@pytest.mark.parametrize("version", ["1.25", "1.25.0", "2.0.1"])
def test_an_onnxruntime_that_is_new_enough_is_not_called_old(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(EngineError, match=r"new\.onnx cannot be loaded") as caught:
        SessionFactory(1).open(graph(tmp_path / "new.onnx", 999))
    assert not isinstance(caught.value, EngineUnavailable)


def test_a_version_is_compared_by_its_numbers() -> None:
    assert release("1.23.2") < NEW_OPSET_NEEDS <= release("1.25.0") < release("1.100") < release("2.0rc1")
    assert release("10.3.0") < (10, 15) and release("unknown") == ()


def test_doctor_tells_of_an_old_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "usable", lambda engines: {})
    for version, told in (("1.23.2", True), ("1.25.0", False), (None, False)):
        monkeypatch.setattr(doctor, "installed_version", lambda names, said=version: said or "")
        shown = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "300"}).output
        assert ("does not open TensorRT's bundles and those of --flavour portable" in shown) is told, version


def raising(error: Exception) -> Callable[[], None]:
    def opens() -> None:
        raise error

    return opens


@pytest.mark.parametrize(
    ("kind", "code"),
    [("package", 4), ("device", 4), ("target", 4), ("version", 4), ("memory", 4), ("damaged", 1), ("graph", 1)],
)
def test_the_exit_code_tells_who_is_at_fault(kind: Any, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert trial.said_by(raising(EngineUnavailable(kind, "said so"))) == code
    assert trial.said_by(raising(EngineError("said so"))) == 1
    assert capsys.readouterr().err == "said so\n" * 2
    assert opening._outcome(code, "x\nsaid so\n") == (f"{NOT_HERE} (said so)" if code == 4 else "was refused (said so)")


def test_verify_does_not_blame_the_bundle_for_a_library_that_is_not_there(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bare_bundle(tiny_model, tmp_path / "bundle", "onnx", "fp32")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "onnxruntime.py").write_text("raise ImportError('not on this machine')")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    result = CliRunner().invoke(main, ["verify", str(bundle.path), "--load"])
    assert result.exit_code == 1
    assert "of its graphs 5 could not be opened: codec/codec, encoder/encoder, " in result.stderr
    assert result.stderr.count("not on this machine") == 1 and "Nothing else is known against them" in result.stderr
    assert "Do not run" not in result.stderr


def test_graphs_of_an_alternative_open_too(tiny_model: Any, tmp_path: Path) -> None:
    """llama.cpp's child looks for the component that a file belongs to, also among the alternatives."""
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: the extra [gguf]")
    parts = [bare_bundle(tiny_model, tmp_path / f, f, {"onnx": "fp32", "gguf": "q8_0"}[f]) for f in ("onnx", "gguf")]
    for one in parts:
        one.manifest.provenance["source_hash"] = "same"
    both = tmp_path / "both"
    _combined(parts, both)
    bundle = Bundle.open(both)
    (other,) = bundle.manifest.alternatives["llm"]
    assert open_apart("llama.cpp", bundle.file(other.graphs["body"].path)) == ""


def _combined(parts: list[Bundle], out: Path) -> None:
    from edgeomni.bundle import write_manifest

    for one in parts:
        write_manifest(one.path, one.manifest)
    combine([one.path for one in parts], out)


@pytest.mark.parametrize(
    ("version", "says"), [("10.3.0", True), ("10.14.1.48", True), ("10.15.1", False), ("11.3.0", False), ("", False)]
)
def test_a_tensorrt_that_does_not_know_the_operators(version: str, says: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "version_of", lambda name: version if name == "tensorrt" else "")
    said = library.too_old("tensorrt")
    assert bool(said) is says and library.too_old("tensorrt_rtx") == ""
    assert not says or (f"tensorrt {version} does not take" in said and "10.15 or newer" in said)
    assert (problem("cuda") == said) is says
    if version:
        _built_with(Facts("Orin", "sm_87", 12060, integrated=True), says, monkeypatch)


def _built_with(facts: Facts, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "installed", lambda names: ["tensorrt"])
    if not refused:
        assert sources._package(facts, None, "why") == "tensorrt"  # type: ignore[arg-type]
        return
    with pytest.raises(EngineUnavailable, match=r"10\.15 or newer") as caught:
        sources._package(facts, None, "why")  # type: ignore[arg-type]
    assert caught.value.kind == "version"


def test_the_distribution_s_version_is_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian packages leave it: a folder tensorrt-10.3.0.dist-info beside the modules."""
    there = tmp_path / "tensorrt-10.3.0.dist-info"
    there.mkdir()
    (there / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 10.3.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "tensorrt" in library.installed() and "tensorrt 10.3.0 does not take" in library.too_old("tensorrt")


@pytest.mark.parametrize(
    ("engine", "missing"), [("llama.cpp", "gguf"), ("llama.cpp", "llama_cpp"), ("openvino", "openvino")]
)
def test_an_engine_that_is_not_installed_is_of_kind_package(engine: str, missing: str, tmp_path: Path) -> None:
    """Asked in a process of its own, where the library cannot be imported."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from pathlib import Path\n"
        "from edgeomni.errors import EngineUnavailable\n"
        "try:\n"
        "    if sys.argv[1] == 'openvino':\n"
        "        import edgeomni.openvino_library\n"
        "    elif sys.argv[2] == 'gguf':\n"
        "        from edgeomni.runtimes.ggml.files import _reader; _reader(Path('x'))\n"
        "    else:\n"
        "        from edgeomni.runtimes.llamacpp.library import llama; llama()\n"
        "except EngineUnavailable as exc:\n"
        "    print(exc.kind, exc)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, engine, missing]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("package ") and "pip install" in done.stdout, done.stderr
