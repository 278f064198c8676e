"""Bundles of one checkpoint put together: what the result holds, what it runs, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from engine_bundles import answer, bare_bundle

from edgeomni import Bundle, Session, runtimes
from edgeomni.bundle import write_manifest
from edgeomni.cli import main
from edgeomni.combine import combine
from edgeomni.engines import COMPONENTS
from edgeomni.errors import BundleError, EdgeOmniError, UsageError
from edgeomni.profiling import compare, measure
from edgeomni.runtimes import choice


@pytest.fixture(scope="module")
def made(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The tiny model in two formats, and both of them combined."""
    root = tmp_path_factory.mktemp("combine")
    onnx = bare_bundle(tiny_model, root / "onnx", "onnx", "fp32")
    gguf = bare_bundle(tiny_model, root / "gguf", "gguf", "fp32")
    return {"onnx": onnx, "gguf": gguf, "both": combine([onnx.path, gguf.path], root / "both")}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "has_nvidia_gpu", lambda: False)


def opened(bundle: Bundle, **how: Any) -> Session:
    return Session.open(bundle, threads=1, overlap="off", **how)


def test_the_first_bundle_stays_as_it_was_and_the_other_is_beside_it(made: dict[str, Bundle]) -> None:
    onnx, gguf, both = made["onnx"].manifest, made["gguf"].manifest, made["both"].manifest
    assert both.components == onnx.components and both.spec == onnx.spec
    for name in COMPONENTS:
        (other,) = both.alternatives[name]
        own = gguf.components[name]
        assert (other.format, other.precision, other.scheme) == ("gguf", own.precision, own.scheme)
        assert [(e.size, e.sha256) for e in other.files] == [(e.size, e.sha256) for e in own.files]
        assert all(entry.path.startswith("alternatives/1/") for entry in other.files)
    assert both.gate["alternatives"] == {"1": gguf.gate} and both.gate["made"] == "onnx"
    assert made["both"].size == onnx_size(made) and made["both"].digest != made["onnx"].digest


def onnx_size(made: dict[str, Bundle]) -> int:
    tokenizer = made["onnx"].manifest.tokenizer
    return made["onnx"].size + made["gguf"].size - (tokenizer.size if tokenizer else 0)


@pytest.mark.parametrize("name", ["onnx", "gguf"])
def test_each_format_answers_as_its_own_bundle_does(name: str, made: dict[str, Bundle]) -> None:
    engine = {"onnx": "onnxruntime", "gguf": "llama.cpp"}[name]
    with opened(made["both"], engine=engine) as session, opened(made[name]) as alone:
        assert {way.split(" on ")[0] for way in session.ways.values()} == {engine}
        for here, there in zip(answer(session), answer(alone), strict=True):
            np.testing.assert_array_equal(here, there)


def test_components_of_different_engines_answer_together(made: dict[str, Bundle]) -> None:
    mixed = {"llm": "llama.cpp"}
    with opened(made["both"], engine=mixed) as session, opened(made["onnx"]) as alone:
        assert session.ways["llm"] == "llama.cpp on cpu (gguf:fp32)"
        assert session.ways["codec"] == "onnxruntime on cpu (onnx:fp32)"
        (ids, wave), (wanted, sound) = answer(session), answer(alone)
        np.testing.assert_array_equal(ids, wanted)
        np.testing.assert_array_equal(wave, sound)


def test_what_is_judged_and_verified_is_the_first_bundle_and_every_file(
    made: dict[str, Bundle], tmp_path: Path
) -> None:
    both = Bundle.open(made["both"].path, hashes=True)
    assert [runtimes.chosen_engine(both, name).name for name in COMPONENTS] == ["onnxruntime"] * 3
    copy = tmp_path / "copy"
    shutil.copytree(both.path, copy)
    victim = next((copy / "alternatives").rglob("*.gguf"))
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    with pytest.raises(BundleError, match=r"alternatives/1/.*differ"):
        Bundle.open(copy, hashes=True)
    victim.unlink()
    with pytest.raises(BundleError, match=r"alternatives/1/.*missing"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["alternatives"].update(mouth=[]), r"\$\.alternatives: unknown component 'mouth'"),
        (lambda d: d["alternatives"].update(llm=[d["components"]["llm"]]), "has the format 'onnx' twice"),
        (lambda d: d["alternatives"]["llm"][0].update(name="codec"), r"alternatives\.llm\[0\]\.name: is 'codec'"),
        (lambda d: d["alternatives"]["llm"][0]["graphs"].pop("body"), r"alternatives\.llm\[0\]\.graphs: body missing"),
        (lambda d: d["alternatives"].update(llm=3), r"alternatives\.llm"),
        (lambda d: d["alternatives"]["llm"][0]["files"].clear(), "not among the listed files"),
    ],
)
def test_a_manifest_with_wrong_alternatives_is_refused(
    change: Any, said: str, made: dict[str, Bundle], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made["both"].path, copy)
    data = json.loads((copy / "bundle.json").read_text())
    change(data)
    (copy / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=said):
        Bundle.open(copy, hashes=False)


def changed(bundle: Bundle, path: Path, **provenance: Any) -> Path:
    """A copy of the bundle that says that it comes from elsewhere."""
    shutil.copytree(bundle.path, path)
    manifest = replace(bundle.manifest, provenance={**bundle.manifest.provenance, **provenance})
    write_manifest(path, manifest)
    return path


def test_what_does_not_belong_together_is_refused(made: dict[str, Bundle], tmp_path: Path) -> None:
    onnx, out = made["onnx"].path, tmp_path / "out"
    stranger = changed(made["gguf"], tmp_path / "stranger", source_hash="0" * 64)
    for sources, said in (
        ([onnx], "two bundles or more"),
        ([onnx, stranger], "is not of the same checkpoint"),
        ([onnx, onnx], "nothing to add"),
        ([made["both"].path, made["gguf"].path], "nothing to add"),
    ):
        with pytest.raises(UsageError, match=said):
            combine(sources, out)
    with pytest.raises(UsageError, match="exists"):
        combine([onnx, made["gguf"].path], made["both"].path)
    with pytest.raises(UsageError, match="one of the bundles"):
        combine([onnx, made["gguf"].path], onnx, force=True)
    with pytest.raises(BundleError, match="no such bundle"):
        combine([onnx, tmp_path / "gone"], out)
    assert not out.exists()


def test_a_combined_bundle_takes_more_beside_what_it_has(made: dict[str, Bundle], tmp_path: Path) -> None:
    """Each addition gets a folder of its own, with the next number, whatever the order of names."""
    for at in ("2", "10"):
        named = [replace(part, format=f"made{at}") for part in made["onnx"].manifest.components.values()]
        shutil.copytree(made["onnx"].path, tmp_path / at)
        manifest = replace(made["onnx"].manifest, components={c.name: c for c in named}, gate={"made": at})
        write_manifest(tmp_path / at, manifest)
    twice = combine([made["both"].path, tmp_path / "2"], tmp_path / "twice")
    again = combine([twice.path, tmp_path / "10"], tmp_path / "again")
    folders = [{e.path.split("/")[1] for e in part.files} for part in again.manifest.alternatives["llm"]]
    assert folders == [{"1"}, {"2"}, {"3"}]
    gates = again.manifest.gate["alternatives"]
    assert {number: gate["made"] for number, gate in gates.items()} == {"1": "gguf", "2": "2", "3": "10"}
    assert Bundle.open(again.path, hashes=True).digest == again.digest


def test_what_was_not_copied_as_it_is_gets_no_name(
    made: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses the end of a file: the copies are compared with their hashes before the bundle has its name."""
    whole = shutil.copyfile

    def cut(source: Path, target: Path) -> None:
        whole(source, target)
        if target.suffix == ".gguf":
            target.write_bytes(target.read_bytes()[:-1])

    monkeypatch.setattr(shutil, "copyfile", cut)
    with pytest.raises(BundleError, match="gguf"):
        combine([made["onnx"].path, made["gguf"].path], tmp_path / "both")
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "cache"])


def test_force_replaces_a_bundle_and_nothing_else(made: dict[str, Bundle], tmp_path: Path) -> None:
    sources, out = [made["onnx"].path, made["gguf"].path], tmp_path / "out"
    combine(sources, out)
    assert combine(sources, out, force=True).digest == made["both"].digest
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="notes.txt"):
        combine(sources, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_the_command_tells_what_it_put_together(made: dict[str, Bundle], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["combine", str(made["onnx"].path), str(made["gguf"].path), "-o", str(out)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and "llm: onnx:fp32, gguf:fp32" in result.stderr
    shown = CliRunner().invoke(main, ["inspect", str(out)]).output
    assert shown.count("(alternative)") == 3 and "gguf" in shown
    assert CliRunner().invoke(main, command).exit_code == 2


# --- the profile that compares


def test_a_step_down_in_the_measuring_process_is_told_once(
    made: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """llama.cpp comes first in the bundle and has lost its libraries; and what was measured cannot be kept."""
    bundle = combine([made["gguf"].path, made["onnx"].path], tmp_path / "gguf-first")
    (tmp_path / "path" / "llama_cpp").mkdir(parents=True)
    (tmp_path / "path" / "llama_cpp" / "__init__.py").write_text("")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setattr(measure, "_told", set())
    brief = measure.Job(str(bundle.path), seconds=0.5, turns=1, warmup=0, threads=1, forced_frames=2, overlap="off")
    for _ in range(2):
        result = measure.measure_apart(brief)
        assert result["engines"]["llm"] == "onnxruntime on cpu (onnx:fp32)" and "warnings" not in result
    told = [r.getMessage() for r in caplog.records]
    (step,) = (text for text in told if "llama.cpp on cpu cannot be used" in text)
    assert "install llama-cpp-python again" in step and "not measured yet" in step
    assert len([text for text in told if "cannot be kept in" in text and str(tmp_path / "file") in text]) == 1
    with pytest.raises(EdgeOmniError, match="--strict allows no step down"):
        measure.measure_apart(replace(brief, strict=True))


def test_every_set_is_measured_and_auto_takes_the_fastest(made: dict[str, Bundle]) -> None:
    """Measured in this process; what is fastest on a busy machine is whatever was measured as that."""
    job = measure.Job(str(made["both"].path), seconds=0.5, turns=1, warmup=0, forced_frames=8, threads=1, overlap="off")
    told: list[str] = []
    found = compare.compare(job, told.append, measure.measure)
    assert told[:2] == ["onnxruntime on cpu", "llama.cpp on cpu"] and not found.failed
    sets = [report["engines"] for report in found.reports]
    assert len(sets) in (2, 3) and len({tuple(sorted(s.items())) for s in sets}) == len(sets)
    fastest = min(
        found.reports,
        key=lambda r: (r["turn"]["rtf"] >= 1, r["turn"]["rtf"] if r["turn"]["rtf"] >= 1 else r["turn"]["ttfa"]),
    )
    assert found.picked is fastest and found.auto == fastest["engines"]
    with opened(made["both"]) as session:
        assert session.ways == found.auto


def report_of(engines: Mapping[Any, str], encoder: float, frame: float, codec: float, ttfa: float) -> dict[str, Any]:
    stages = {"encoder": encoder, "prefill": 1.0, "frame": frame, "codec": codec}
    return {
        "engines": dict(engines),
        "stages": {name: {"p50_ms": ms} for name, ms in stages.items()},
        "turn": {"ttfa": ttfa, "rtf": 0.2},
        "peak_rss_mb": 100.0,
        "load_s": 1.0,
    }


def test_the_mixture_is_of_the_fastest_parts(made: dict[str, Bundle]) -> None:
    labels = {
        "onnxruntime": dict.fromkeys(COMPONENTS, "onnxruntime on cpu (onnx:fp32)"),
        "llama.cpp": {
            **dict.fromkeys(COMPONENTS, "llama.cpp on cpu (gguf:fp32)"),
            "codec": "llama.cpp on cpu (gguf:f16)",
        },
    }
    jobs: list[measure.Job] = []

    def measured(job: measure.Job) -> dict[str, Any]:
        jobs.append(job)
        if isinstance(job.engine, dict) and len(set(job.engine.values())) > 1:
            return report_of({k: labels[v][k] for k, v in job.engine.items()}, 1, 1, 1, 0.1)
        onnx = "llama.cpp" not in str(job.engine)
        return report_of(labels["onnxruntime" if onnx else "llama.cpp"], *((9, 2, 3, 0.5) if onnx else (4, 5, 6, 0.4)))

    found = compare.compare(measure.Job(str(made["both"].path)), measure=measured)
    assert jobs[-1].engine == {"encoder": "llama.cpp", "llm": "onnxruntime", "codec": "onnxruntime"}
    assert jobs[-1].device == "cpu" and jobs[-1].strict and len(found.reports) == 3
    shown = "\n".join(str(part) for part in compare.tables(found))
    assert "--engine auto takes: onnxruntime on cpu" in shown, "nothing was remembered, so the order decides"


def test_an_engine_that_runs_some_components_is_measured_with_those(made: dict[str, Bundle], tmp_path: Path) -> None:
    gguf, onnx = made["gguf"].manifest.components, made["onnx"]
    shutil.copytree(made["gguf"].path, tmp_path / "mixed")
    shutil.copytree(onnx.path / "encoder", tmp_path / "mixed" / "encoder", dirs_exist_ok=True)
    mixed = {**gguf, "encoder": onnx.manifest.components["encoder"]}
    write_manifest(tmp_path / "mixed", replace(made["gguf"].manifest, components=mixed))
    both = combine([onnx.path, tmp_path / "mixed"], tmp_path / "both")
    assert set(both.manifest.alternatives) == {"llm", "codec"}
    jobs: list[measure.Job] = []

    def measured(job: measure.Job) -> dict[str, Any]:
        jobs.append(job)
        ways = runtimes.chosen(both, job.engine, job.device).first
        return report_of({name: way.label for name, way in ways.items()}, 1, 1, 1, 1)

    compare.compare(measure.Job(str(both.path)), measure=measured)
    all_onnx = dict.fromkeys(COMPONENTS, "onnxruntime")
    assert [job.engine for job in jobs] == [all_onnx, {"llm": "llama.cpp", "codec": "llama.cpp"}]
    assert [(job.device, job.strict) for job in jobs] == [("cpu", False), ("cpu", True)]


def test_comparing_needs_a_bundle_and_no_engine(made: dict[str, Bundle], tiny_dir: Path) -> None:
    for source, engine in ((made["both"].path, "onnxruntime"), (tiny_dir, None)):
        with pytest.raises(UsageError, match="leave --engine out"):
            compare.compare(measure.Job(str(source), engine=engine))  # type: ignore[arg-type]


def test_sets_that_fail_are_told_and_the_others_stand(made: dict[str, Bundle]) -> None:
    def measured(job: measure.Job) -> dict[str, Any]:
        if job.engine == "llama.cpp":
            raise BundleError("its file is cut")
        return report_of(dict.fromkeys(COMPONENTS, "onnxruntime on cpu (onnx:fp32)"), 1, 2, 3, 0.5)

    found = compare.compare(measure.Job(str(made["both"].path)), measure=measured)
    assert found.failed == {"llama.cpp on cpu": "its file is cut"} and len(found.reports) == 1
    assert any("llama.cpp on cpu could not be measured: its file is cut" in str(t) for t in compare.tables(found))

    def never(job: measure.Job) -> dict[str, Any]:
        raise BundleError("nothing works")

    with pytest.raises(BundleError, match="nothing works"):
        compare.compare(measure.Job(str(made["both"].path)), measure=never)
