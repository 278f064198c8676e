"""Export as a whole: passes, refuses, and leaves nothing half done."""

from __future__ import annotations

import copy
import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeomni import export, outputs
from edgeomni.bundle import Bundle, Component, describe_files
from edgeomni.errors import ExportError, GateError, UsageError
from edgeomni.exporters.onnx.graph import Graph
from edgeomni.gate import run
from edgeomni.gate.judge import GateOptions

PRECISIONS = ("int4", "int8", "fp16", "fp32")


def exported(model: Any, out: Path, precision: str = "int4", **kwargs: Any) -> Bundle:
    return export.export_bundle(model, out, precision=precision, threads=1, **kwargs)


@pytest.fixture(scope="module")
def bundles(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    return {p: exported(tiny_model, root / p, p) for p in PRECISIONS}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_passes_its_gate(bundles: dict[str, Bundle], precision: str) -> None:
    bundle = bundles[precision]
    gate = bundle.manifest.gate
    assert gate["passed"] is True
    assert {f["verdict"] for f in gate["fidelity"].values()} <= {"pass", "recorded"}
    assert {f["verdict"] for f in gate["quality"].values()} == {"not judged: random weights"}
    assert set(gate["quality"]) == {"encoder.cosine", "llm.kl", "llm.top1", "codec.log_mel"}
    assert gate["details"]["llm"]["positions"] >= 200
    Bundle.open(bundle.path, hashes=True)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_the_portable_flavour_passes_too(tiny_model: Any, tmp_path: Path, precision: str) -> None:
    gate = exported(tiny_model, tmp_path / "out", precision, options={"onnx": {"flavour": "portable"}}).manifest.gate
    assert gate["passed"] is True
    assert "llm.excess" not in gate["fidelity"]  # what rounds activations there is the engine's affair


def test_sizes_fall_with_precision(bundles: dict[str, Bundle]) -> None:
    sizes = [bundles[p].size for p in ("int4", "int8", "fp16", "fp32")]
    assert sizes == sorted(sizes)


def test_the_manifest_tells_where_it_comes_from(bundles: dict[str, Bundle], tiny_model: Any) -> None:
    manifest = bundles["int4"].manifest
    assert manifest.provenance["weights"] == "random"
    assert manifest.provenance["source_hash"] == tiny_model.provenance["source_hash"]
    assert {"torch", "onnx", "onnxruntime"} <= set(manifest.provenance["tools"])
    assert manifest.provenance["command"] == (
        "edgeomni export CHECKPOINT -o BUNDLE --encoder onnx:int8 --llm onnx:int4 --codec onnx:fp32"
    )
    assert str(bundles["int4"].path.parent) not in json.dumps(manifest.to_dict())
    assert manifest.licences == tiny_model.licences
    assert (bundles["int4"].path / "tokenizer.json").read_text(encoding="utf-8") == tiny_model.tokenizer_json


def test_exporting_twice_gives_the_same_hashes(bundles: dict[str, Bundle], tiny_model: Any, tmp_path: Path) -> None:
    again = exported(tiny_model, tmp_path / "again")
    assert again.digest == bundles["int4"].digest
    assert again.entries() == bundles["int4"].entries()


def test_the_model_is_left_as_it_was(tiny_model: Any, bundles: dict[str, Bundle]) -> None:
    from edgeomni.model import checkpoints

    fresh = checkpoints.preset("tiny", 0).state_dict()
    assert all(np.array_equal(t.numpy(), fresh[n].numpy()) for n, t in tiny_model.state_dict().items())
    assert "text_logits" not in vars(tiny_model)


def labelled_trained(model: Any) -> Any:
    trained = copy.deepcopy(model)
    trained.provenance = {**model.provenance, "weights": "trained"}
    return trained


def test_trained_weights_are_judged_for_quality(tiny_model: Any, tmp_path: Path) -> None:
    trained = labelled_trained(tiny_model)
    trained.encoder.layer_norm.weight.data[0] = 1.01
    trained.body.norm.weight.data[0] = 1.01
    with pytest.raises(GateError, match=r"quality llm\.top1"):
        exported(trained, tmp_path / "out", formats={"encoder": "onnx:fp32"})
    assert list(tmp_path.iterdir()) == []


def test_weights_whose_norms_never_moved_are_random_whatever_the_label_says(tiny_model: Any, tmp_path: Path) -> None:
    """The released layout has no place to say so."""
    bundle = exported(labelled_trained(tiny_model), tmp_path / "out")
    assert bundle.manifest.provenance["weights"] == "random"
    assert "as initialised" in bundle.manifest.provenance["random_because"]


# --- corruption between exporter and gate ---------------------------------------------------------------------------

Damage = Callable[[Path, Component], Component]


def corrupting(monkeypatch: pytest.MonkeyPatch, name: str, damage: Damage) -> None:
    original = export._exported

    def exported(model: Any, component: str, stage: Path, *rest: Any) -> Component:
        entry = original(model, component, stage, *rest)
        return damage(stage, entry) if component == name else entry

    monkeypatch.setattr(export, "_exported", exported)


def flip_one_weight(stage: Path, entry: Component) -> Component:
    """One bit of one stored weight; the recorded hashes are made to fit, so that only the content can tell."""
    path = next(stage / f.path for f in entry.files if f.path.endswith(".data"))
    data = bytearray(path.read_bytes())
    data[0] ^= 0x10
    path.write_bytes(data)
    entry.files = describe_files(stage, [stage / f.path for f in entry.files])
    return entry


@pytest.mark.parametrize("name", ["encoder", "llm", "codec"])
@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_one_corrupted_weight_is_found_and_nothing_kept(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    corrupting(monkeypatch, name, flip_one_weight)
    with pytest.raises(GateError, match=rf"fidelity {name}\.altered is 1.*altered tensors: {name}/") as caught:
        exported(tiny_model, tmp_path / "out", precision)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changed_after_it_was_hashed_is_found(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append(stage: Path, entry: Component) -> Component:
        with (stage / entry.files[0].path).open("ab") as f:
            f.write(b"\0")
        return entry

    corrupting(monkeypatch, "codec", append)
    with pytest.raises(GateError, match="codec/codec/codec.onnx"):
        exported(tiny_model, tmp_path / "out")


def spoil_one_value(stage: Path, entry: Component) -> Component:
    """One bias or scale of every graph far off: what a wrong exporter might do."""
    for path in (stage / f.path for f in entry.files if f.path.endswith(".data")):
        values = np.fromfile(path, np.float32)
        at = np.flatnonzero((np.abs(values) > 1e-3) & (np.abs(values) < 10))[-1]
        values[at] *= 1e3
        values.tofile(path)
    return entry


@pytest.mark.parametrize(
    ("name", "figure"), [("encoder", r"encoder\.cosine"), ("llm", r"llm\.top1"), ("codec", r"codec\.si_sdr")]
)
def test_running_the_export_finds_what_reading_it_did_not(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, figure: str
) -> None:
    corrupting(monkeypatch, name, spoil_one_value)
    monkeypatch.setattr(run, "_altered", lambda *_: [])
    with pytest.raises(GateError, match=figure):
        exported(tiny_model, tmp_path / "out", "fp32")
    assert list(tmp_path.iterdir()) == []


def test_without_enforcement_misses_are_told_and_kept(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    corrupting(monkeypatch, "encoder", flip_one_weight)
    told: list[dict[str, Any]] = []
    with caplog.at_level(logging.WARNING, "edgeomni"):
        bundle = exported(tiny_model, tmp_path / "out", gate=GateOptions(enforce=False), on_gate=told.append)
    assert "encoder.altered" in caplog.text
    assert bundle.manifest.gate["passed"] is False
    assert told == [bundle.manifest.gate]


# --- the disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path, bundles: dict[str, Bundle]) -> Path:
    """A bundle that lies where the new one should go."""
    return Path(shutil.copytree(bundles["int4"].path, tmp_path / "room" / "out"))


def assert_untouched(old: Path, bundles: dict[str, Bundle]) -> None:
    assert [p.name for p in old.parent.iterdir()] == ["out"]
    assert Bundle.open(old, hashes=True).digest == bundles["int4"].digest


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second graph's data stops half way."""
    original, calls = Graph.save, list[Path]()

    def save(self: Graph, path: Path) -> list[Path]:
        calls.append(path)
        if len(calls) == 2:
            path.with_name(path.name + ".data").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, path)

    monkeypatch.setattr(Graph, "save", save)


def test_full_disk_leaves_nothing(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch)
    with pytest.raises(ExportError, match="No space left on device.*free some space"):
        exported(tiny_model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_older_bundle(
    tiny_model: Any, old: Path, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch)
    with pytest.raises(ExportError):
        exported(tiny_model, old, "fp32", force=True)
    assert_untouched(old, bundles)


@pytest.mark.parametrize("step", ["export llm (onnx:fp32)", "gate: encoder", "write bundle"])
def test_ctrl_c_keeps_the_older_bundle(tiny_model: Any, old: Path, bundles: dict[str, Bundle], step: str) -> None:
    def progress(now: str) -> None:
        if now == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exported(tiny_model, old, "fp32", force=True, progress=progress)
    assert_untouched(old, bundles)


def test_a_missed_gate_keeps_the_older_bundle(
    tiny_model: Any, old: Path, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupting(monkeypatch, "llm", flip_one_weight)
    with pytest.raises(GateError):
        exported(tiny_model, old, "fp32", force=True)
    assert_untouched(old, bundles)


def test_a_failed_rename_keeps_the_older_bundle(
    tiny_model: Any, old: Path, bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> bool:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(outputs, "exchange", refused)
    with pytest.raises(ExportError, match="Permission denied"):
        exported(tiny_model, old, "fp32", force=True)
    assert_untouched(old, bundles)


def test_force_replaces_the_older_bundle(tiny_model: Any, old: Path, bundles: dict[str, Bundle]) -> None:
    exported(tiny_model, old, "fp32", force=True)
    assert [p.name for p in old.parent.iterdir()] == ["out"]
    assert Bundle.open(old, hashes=True).digest == bundles["fp32"].digest


def test_what_exists_is_refused(tiny_model: Any, old: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists.*--force"):
        exported(tiny_model, old)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="no bundle, so --force does not overwrite"):
        exported(tiny_model, tmp_path / "home", force=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "mine"


def test_what_appears_meanwhile_is_left_alone(tiny_model: Any, tmp_path: Path) -> None:
    target = tmp_path / "out"

    def progress(now: str) -> None:
        if now == "write bundle":
            target.mkdir()
            (target / "letter.txt").write_text("mine")

    with pytest.raises(UsageError, match="out appeared meanwhile"):
        exported(tiny_model, target, progress=progress)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "letter.txt"]


@pytest.mark.parametrize("name", ["notes.txt", "llm/notes.txt", "ck/model.safetensors"])
def test_a_bundle_that_also_holds_other_files_is_not_replaced(
    tiny_model: Any, old: Path, bundles: dict[str, Bundle], name: str
) -> None:
    (old / name).parent.mkdir(exist_ok=True)
    (old / name).write_text("mine")
    said = name.split("/")[0] if name.startswith("ck") else name
    with pytest.raises(UsageError, match=rf"also holds {said}, which its bundle\.json does not list"):
        exported(tiny_model, old, force=True)
    assert (old / name).read_text() == "mine"


def test_another_file_that_appears_meanwhile_saves_the_older_bundle(
    tiny_model: Any, old: Path, bundles: dict[str, Bundle]
) -> None:
    def progress(now: str) -> None:
        if now == "write bundle":
            (old / "notes.txt").write_text("mine")

    with pytest.raises(UsageError, match=r"also holds notes\.txt"):
        exported(tiny_model, old, "fp32", force=True, progress=progress)
    (old / "notes.txt").unlink()
    assert_untouched(old, bundles)


def test_a_damaged_bundle_may_be_replaced(tiny_model: Any, old: Path, bundles: dict[str, Bundle]) -> None:
    manifest = json.loads((old / "bundle.json").read_text())
    (old / "bundle.json").write_text(json.dumps({**manifest, "schema": 99}))
    next(old.glob("llm/*.data")).unlink()
    exported(tiny_model, old, "fp32", force=True)
    assert Bundle.open(old, hashes=True).digest == bundles["fp32"].digest


def test_a_bundle_whose_manifest_cannot_be_read_is_not_replaced(tiny_model: Any, old: Path) -> None:
    (old / "bundle.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read, so what else is in it may be yours"):
        exported(tiny_model, old, force=True)
    assert (old / "llm").is_dir()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("home/ck", "home"),
        ("home/ck", "home/ck"),
        ("home/ck", "home/ck/new"),
        ("home/ck", "link"),
        ("link/ck", "home"),
        ("shortcut", "home"),
        ("home/ck", "shortcut/new"),
        ("home/ck", "home/other/../ck/new"),
    ],
)
def test_a_bundle_and_its_source_may_not_lie_in_one_another(
    tmp_path: Path, source: str, target: str, force: bool
) -> None:
    (tmp_path / "home" / "ck").mkdir(parents=True)
    (tmp_path / "home" / "other").mkdir()
    (tmp_path / "link").symlink_to("home")
    (tmp_path / "shortcut").symlink_to("home/ck")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="lie in one another"):
        exported(tmp_path / source, tmp_path / target, force=force)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_checkpoint_inside_an_older_bundle_survives(tiny_dir: Path, old: Path) -> None:
    source = Path(shutil.copytree(tiny_dir, old / "ck"))
    with pytest.raises(UsageError):
        exported(source, old, force=True)
    assert sorted(p.name for p in source.iterdir()) == sorted(p.name for p in tiny_dir.iterdir())


def test_neighbours_are_not_inside_one_another(tiny_dir: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_dir, tmp_path / "ck"))
    assert exported(source, tmp_path / "ck-bundle").path == tmp_path / "ck-bundle"


def test_a_link_to_a_bundle_stays_a_link(
    tiny_model: Any, old: Path, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(old)
    with pytest.raises(UsageError, match="exists"):
        exported(tiny_model, link, "fp32")
    exported(tiny_model, link, "fp32", force=True)
    assert link.is_symlink() and Bundle.open(old, hashes=True).digest == bundles["fp32"].digest


# --- choices and progress -------------------------------------------------------------------------------------------


def test_formats_fill_up_from_the_precision() -> None:
    assert export.choices("int4", {"codec": "onnx:fp16", "llm": "onnx"}) == {
        "encoder": ("onnx", "int8"),
        "llm": ("onnx", "int4"),
        "codec": ("onnx", "fp16"),
    }


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ({"brain": "onnx:int8"}, "brain"),
        ({"llm": "abacus:int4"}, "abacus"),
        ({"llm": "onnx:int3"}, "int3"),
        ({"encoder": "onnx:int4"}, "floor"),
        ({"codec": "onnx:int8"}, "codec"),
    ],
)
def test_what_is_not_offered_is_refused_before_anything_is_written(
    tiny_model: Any, tmp_path: Path, formats: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        exported(tiny_model, tmp_path / "out", formats=formats)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with export.console_progress() as say:
        say("load checkpoint")
    assert capsys.readouterr().err == "export: load checkpoint\n"


def test_steps_are_counted_right(tiny_model: Any, tmp_path: Path) -> None:
    steps: list[str] = []
    exported(tiny_model, tmp_path / "out", progress=steps.append)
    assert len(steps) == export.STEPS
