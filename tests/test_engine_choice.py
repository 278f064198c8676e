"""Which engine runs a component: the order, steps down that are said or refused, and profiles that decide."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from engine_bundles import GpuEngine, answer, bare_bundle, for_gpu, gpu_engine, labels

from edgeomni import Bundle, Session, measured, runtimes
from edgeomni.cli import main
from edgeomni.engines import COMPONENTS, ENGINES, parse_engine
from edgeomni.errors import BundleError, EngineUnavailable, UsageError, WhyUnavailable
from edgeomni.runtimes import choice

__all__ = ["gpu_engine"]
CPU = {
    "encoder": "onnxruntime on cpu (onnx:fp32)",
    "llm": "onnxruntime on cpu (onnx:fp32)",
    "codec": "onnxruntime on cpu (onnx:fp32)",
}
GPU = dict.fromkeys(COMPONENTS, "phantom on cuda (phantom:fp32)")


@pytest.fixture(scope="module")
def plain(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Portable graphs on the CPU."""
    return bare_bundle(tiny_model, tmp_path_factory.mktemp("choice") / "b", "onnx", "fp32", flavour="portable")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGEOMNI_OVERLAP_CACHE", "0")
    return tmp_path / "cache"


def opened(bundle: Bundle, **how: Any) -> Session:
    return Session.open(bundle, threads=1, overlap="off", **how)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# --- the order


def test_a_gpu_comes_first_and_the_engine_of_the_format_before_one_that_stands_in(
    plain: Bundle, gpu_engine: GpuEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ort = ENGINES["onnxruntime"]
    monkeypatch.setitem(ENGINES, "onnxruntime", replace(ort, formats=(*ort.formats, "phantom")))
    bundle = for_gpu(plain)
    names = [way.label for way in choice.ways_of(bundle, "llm")]
    both = ["onnxruntime on cpu (onnx:fp32)", "onnxruntime on cpu (phantom:fp32)"]
    assert names == ["phantom on cuda (phantom:fp32)", *both]
    monkeypatch.setattr(choice, "has_nvidia_gpu", lambda: True)
    names = [way.label for way in choice.ways_of(bundle, "llm")]
    on_gpu = ["onnxruntime on cuda (onnx:fp32)", "onnxruntime on cuda (phantom:fp32)"]
    assert names == ["phantom on cuda (phantom:fp32)", *on_gpu, *both]


def test_graphs_of_a_cpu_are_tried_on_a_gpu_only_when_that_is_asked_for(
    plain: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "has_nvidia_gpu", lambda: True)
    llm = plain.manifest.components["llm"]
    fused = plain.with_components({"llm": replace(llm, meta={**llm.meta, "flavour": "ort"})})
    devices: Callable[..., list[str]] = lambda *how: [way.device for way in choice.ways_of(*how)]  # noqa: E731
    assert devices(plain, "llm") == ["cuda", "cpu"] and devices(fused, "llm") == ["cpu"]
    assert devices(fused, "llm", None, "cuda") == ["cuda"] == devices(fused, "llm", "onnxruntime", "cuda")
    monkeypatch.setattr(choice, "has_nvidia_gpu", lambda: False)
    assert devices(plain, "llm") == ["cpu"] == devices(plain, "llm", "auto", "auto")


def test_what_judges_a_component_is_what_runs_it_on_a_cpu(plain: Bundle, gpu_engine: GpuEngine) -> None:
    bundle = for_gpu(plain)
    assert runtimes.chosen_engine(bundle, "llm").name == "phantom", "alternatives are not what was exported"
    assert runtimes.chosen_engine(plain, "llm").name == "onnxruntime"
    llm = runtimes.open_components(plain).llm
    assert type(llm).__name__ == "OrtLanguageModel"


@pytest.mark.parametrize(
    ("engine", "device", "said"),
    [
        ("steam", None, "unknown engine 'steam'; known are"),
        ({"mouth": "onnxruntime"}, None, r"unknown component\(s\) mouth"),
        ({"llm": "torch"}, None, "the llm is onnx, which torch does not run; engines that do: onnxruntime"),
        ("llama.cpp", None, "the encoder is onnx, which llama.cpp does not run"),
        (None, "gpu3", "knows no device gpu3"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(plain: Bundle, engine: Any, device: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        runtimes.chosen(plain, engine, device)


def test_engines_are_spelled_for_all_or_for_each() -> None:
    assert parse_engine("auto") == "auto" and parse_engine("torch") == "torch"
    assert parse_engine("llm = llama.cpp,encoder=auto") == {"llm": "llama.cpp", "encoder": "auto"}
    for wrong in ("steam", "llm=steam", "ear=torch", "llm=torch,llm=torch", "llm="):
        with pytest.raises(UsageError):
            parse_engine(wrong)


# --- steps down

KINDS: dict[WhyUnavailable, str] = {
    "package": "tensorrt is not installed; pip install it",
    "device": "no GPU is here; plug one in",
    "target": "body.engine is built for sm_89, this GPU is sm_75; export for it",
    "version": "body.engine was built by 1.7, this machine has 1.8; export again",
    "damaged": "body.engine is cut short; copy the bundle again",
    "memory": "the GPU has 3.1 GB left and 4 are needed; close other programs",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_cannot_open_gives_way_and_the_answer_is_the_other_engines(
    kind: WhyUnavailable, plain: Bundle, gpu_engine: GpuEngine, caplog: pytest.LogCaptureFixture
) -> None:
    gpu_engine.fails = {name: EngineUnavailable(kind, KINDS[kind]) for name in COMPONENTS}
    with opened(for_gpu(plain)) as session, opened(plain) as alone:
        assert session.ways == CPU
        for here, there in zip(answer(session), answer(alone), strict=True):
            np.testing.assert_array_equal(here, there)
    (said,) = warnings_in(caplog)
    assert f"phantom on cuda cannot be used: {KINDS[kind]}" in said
    assert "so encoder, llm, codec run on onnxruntime on cpu instead" in said and "not measured" in said


def test_only_the_component_that_fails_steps_down(
    plain: Bundle, gpu_engine: GpuEngine, caplog: pytest.LogCaptureFixture
) -> None:
    gpu_engine.fails = {"codec": MemoryError()}
    with opened(for_gpu(plain)) as session:
        assert session.ways == {**GPU, "codec": CPU["codec"]}
        assert answer(session)[1].any()
    (said,) = warnings_in(caplog)
    assert "too little memory; so codec runs on onnxruntime on cpu instead" in said


def test_an_engine_that_says_it_cannot_is_not_opened_and_that_is_told_once(
    plain: Bundle, gpu_engine: GpuEngine, caplog: pytest.LogCaptureFixture
) -> None:
    gpu_engine.cannot = "no GPU is here"
    for _ in range(2):
        with opened(for_gpu(plain)) as session:
            assert session.ways == CPU
    assert len(warnings_in(caplog)) == 1 and not gpu_engine.opened


def test_strict_refuses_what_would_step_down(plain: Bundle, gpu_engine: GpuEngine) -> None:
    bundle, fault = for_gpu(plain), EngineUnavailable("target", "built for another GPU")
    assert opened(bundle, strict=True).ways == GPU, "the first choice is none"
    gpu_engine.fails = {"llm": fault}
    with pytest.raises(EngineUnavailable, match=r"llm cannot run on phantom.*another GPU.*--strict") as caught:
        opened(for_gpu(plain), strict=True)
    assert caught.value.kind == "strict"
    loose = for_gpu(plain)
    with opened(loose) as session:
        assert session.ways["llm"] == CPU["llm"]
        with pytest.raises(EngineUnavailable, match="--strict"):  # also where the steps were taken before
            opened(loose, strict=True)
    gpu_engine.cannot = "no GPU is here"
    with pytest.raises(EngineUnavailable, match="encoder cannot run on phantom.*no GPU is here"):
        opened(for_gpu(plain), strict=True)


def test_what_was_opened_before_a_failure_is_closed(plain: Bundle, gpu_engine: GpuEngine) -> None:
    closed: list[str] = []
    bundle = for_gpu(plain)
    gpu_engine.fails = {"llm": EngineUnavailable("memory", "full")}
    picked = runtimes.chosen(bundle)
    first = runtimes.runtime_of(ENGINES["phantom"]).open_component

    def watched(*args: Any) -> Any:
        part = first(*args)
        part.close = lambda: closed.append(args[1])
        return part

    gpu_engine.open_component = watched  # type: ignore[method-assign]
    with pytest.raises(EngineUnavailable):
        runtimes.opened(bundle, picked, runtimes.OpenOptions(1), strict=True)
    assert closed == ["encoder"]


def test_the_last_way_tells_what_was_tried_before(plain: Bundle, gpu_engine: GpuEngine) -> None:
    gpu_engine.fails = {name: EngineUnavailable("target", "built for sm_89") for name in COMPONENTS}
    bundle = for_gpu(plain)
    llm = plain.manifest.components["llm"]
    no_graph = replace(llm.graphs["body"], path="llm/body.onnx.data")
    bundle.manifest.alternatives["llm"] = [replace(llm, graphs={**llm.graphs, "body": no_graph})]
    with pytest.raises(EngineUnavailable, match="body.onnx.data cannot.*tried before that: phantom.*built for sm_89"):
        opened(bundle)
    only = bundle.with_components({})
    gpu_engine.fails = {"llm": EngineUnavailable("target", "built for sm_89")}
    with pytest.raises(EngineUnavailable, match=r"^built for sm_89$") as caught:
        opened(only)
    assert caught.value.kind == "target"


def test_a_broken_bundle_is_not_stepped_over(plain: Bundle, gpu_engine: GpuEngine) -> None:
    gpu_engine.fails = {"llm": BundleError("its table is cut")}
    with pytest.raises(BundleError, match="cut"):
        opened(for_gpu(plain))


def test_the_command_line_says_it_on_stderr_and_refuses_with_strict(
    plain: Bundle, gpu_engine: GpuEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = for_gpu(plain)
    gpu_engine.cannot = "no GPU is here; use another machine"
    monkeypatch.setattr(Bundle, "open", lambda path, hashes=None: bundle)

    def run(*more: str) -> Result:
        asked = ["run", str(plain.path), "--task", "tt", "--text", "hello", "--max-length", "80", "--threads", "1"]
        return CliRunner().invoke(main, [*asked, "--overlap", "off", *more])

    said = run()
    assert said.exit_code == 0 and said.stderr.count("warning: ") == 1 and "no GPU is here" in said.stderr
    refused = run("--strict")
    assert refused.exit_code == 1 and "Error: the encoder cannot run on phantom" in refused.stderr
    assert "warning" not in run("--engine", "onnxruntime", "--strict").stderr
    assert run("--engine", "encoder=steam").exit_code == 2


# --- profiles


def run_of(bundle: Bundle, ways: dict[str, str], **changed: Any) -> measured.Run:
    facts: dict[str, Any] = {
        "bundle": bundle.digest,
        "machine": measured.this_machine(),
        "threads": 1,
        "question": {"seconds": 5.0},
        "ways": ways,
        "versions": {},
        "date": "2026-11-26T10:00:00+00:00",
        "stages": {"encoder": 100.0, "frame": 20.0, "codec": 8.0},
        "ttfa": 1.0,
        "rtf": 0.3,
    }
    return measured.Run(**{**facts, **changed})


def keep(*runs: measured.Run) -> None:
    for run in runs:
        assert measured.remember(run) is not None


def test_the_price_is_the_profiles(plain: Bundle, gpu_engine: GpuEngine, caplog: pytest.LogCaptureFixture) -> None:
    bundle = for_gpu(plain)
    gpu_engine.cannot = "no GPU is here"
    keep(
        run_of(bundle, GPU, stages={"frame": 4.5, "encoder": 7.0}),
        run_of(bundle, CPU, stages={"frame": 17.0, "encoder": 430.0, "codec": 9.0}),
    )
    with opened(bundle):
        (said,) = warnings_in(caplog)
    assert "the encoder then takes 430.0 ms instead of 7.0: +423.0 ms" in said
    assert "a frame then takes 17.0 ms instead of 4.5: +12.5 ms" in said
    assert "a push of the codec then takes 9.0 ms" in said and "instead of 9" not in said


def test_a_profile_decides_between_what_was_measured(
    plain: Bundle, gpu_engine: GpuEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "edgeomni")
    mixed = {**GPU, "llm": CPU["llm"]}
    bundle = for_gpu(plain)
    keep(run_of(bundle, GPU, ttfa=1.0), run_of(bundle, mixed, ttfa=0.7), run_of(bundle, CPU, ttfa=0.9))
    with opened(bundle) as session:
        assert session.ways == mixed and session.measured and session.measured.ttfa == 0.7
    assert any("chosen by the profile" in r.getMessage() and "0.70 s" in r.getMessage() for r in caplog.records)
    assert not warnings_in(caplog), "what a profile chose is no step down"
    gpu_engine.cannot = "no GPU is here"
    with opened(for_gpu(plain)) as session:
        assert session.ways == CPU, "what was measured cannot be had any more"


@pytest.mark.parametrize(
    "changed",
    [
        {"machine": ["another", "2", ""]},
        {"threads": 2},
        {"versions": {"onnxruntime": "0.1"}},
        {"question": {"seconds": 1.0}},
        {"bundle": "0" * 64},
    ],
    ids=["machine", "threads", "version", "question", "bundle"],
)
def test_a_profile_of_something_else_decides_nothing(
    changed: dict[str, Any], plain: Bundle, gpu_engine: GpuEngine
) -> None:
    bundle = for_gpu(plain)
    keep(run_of(bundle, GPU), replace(run_of(bundle, CPU, ttfa=0.1), **changed))
    assert labels(runtimes.chosen(bundle, threads=1).first) == GPU
    keep(run_of(bundle, CPU, ttfa=0.1))
    assert labels(runtimes.chosen(bundle, threads=1).first) == CPU


def test_where_the_first_choice_was_never_measured_nothing_is_known_of_it(plain: Bundle, gpu_engine: GpuEngine) -> None:
    bundle = for_gpu(plain)
    keep(run_of(bundle, CPU, ttfa=0.01))
    assert labels(runtimes.chosen(bundle, threads=1).first) == GPU
