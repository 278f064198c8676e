"""Thresholds, verdicts, spellings; and teacher forcing on scripted components."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgeomni.errors import GateError, UsageError
from edgeomni.gate import figures, judge, teacher_forcing
from edgeomni.quantize.schemes import Scheme
from edgeomni.spec import FrontEndSpec

PRECISIONS = {"encoder": "int8", "llm": "int4", "codec": "fp32"}
GOOD = {
    "fidelity": {"encoder.cosine": 0.9995, "llm.top1": 1.0, "codec.si_sdr": 90.0},
    "quality": {"llm.kl": 0.1, "codec.log_mel": 0.001},
}


def judged(figures: dict[str, Any], *, trained: bool = True, limits: dict[str, float] | None = None) -> judge.Report:
    options = judge.GateOptions(limits=limits or {})
    return judge.judge(figures, PRECISIONS, trained=trained, options=options, details={})  # type: ignore[arg-type]


def test_good_figures_pass() -> None:
    report = judged(GOOD)
    assert report.missed == []
    report.enforce()
    assert report.to_dict()["passed"] is True


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("fidelity", "encoder.cosine", 0.9989),
        ("fidelity", "llm.top1", 0.994),
        ("fidelity", "codec.si_sdr", 59.0),
        ("fidelity", "codec.si_sdr", math.nan),
        ("quality", "llm.kl", 5.0),
    ],
)
def test_each_miss_is_named_with_exit_code_3(part: str, name: str, value: float) -> None:
    report = judged({p: {**figures, **({name: value} if p == part else {})} for p, figures in GOOD.items()})
    with pytest.raises(GateError, match=name.replace(".", r"\.")) as caught:
        report.enforce()
    assert caught.value.exit_code == 3
    assert report.to_dict()["passed"] is False


def test_thresholds_follow_the_precision() -> None:
    encoder = {"fidelity": {"encoder.cosine": 0.9995}}
    assert judged(encoder).missed == []
    options = judge.GateOptions()
    strict = judge.judge(encoder, {"encoder": "fp32"}, trained=True, options=options, details={})  # type: ignore[arg-type]
    assert [f.name for f in strict.missed] == ["encoder.cosine"]


def test_random_weights_are_recorded_but_their_quality_is_not_judged() -> None:
    figures = {"fidelity": {"llm.top1": 1.0}, "quality": {"llm.kl": 9.0}}
    assert judged(figures, trained=True).missed
    report = judged(figures, trained=False)
    assert report.missed == []
    entry = report.to_dict()["quality"]["llm.kl"]
    assert (entry["value"], entry["verdict"]) == (9.0, "not judged: random weights")


def test_fidelity_is_judged_for_random_weights_too() -> None:
    assert judged({"fidelity": {"llm.top1": 0.5}}, trained=False).missed


def test_limits_can_be_replaced() -> None:
    assert judged({"fidelity": {"llm.top1": 0.9}}, limits={"llm.top1": 0.9}).missed == []
    assert judged({"quality": {"llm.kl": 0.1}}, limits={"quality.llm.kl": 0.05}).missed
    assert judged({"fidelity": {"llm.top1": 0.99}, "quality": {"llm.top1": 0.8}}, limits={"llm.top1": 0.9}).missed == []


def test_every_issue_threshold_is_there() -> None:
    limits = {f.name: f.limit for f in judged(GOOD).figures}
    assert (limits["encoder.cosine"], limits["llm.top1"], limits["codec.si_sdr"]) == (0.999, 0.995, 60)


@pytest.mark.parametrize("text", ["llm.top1", "llm.top1=", "llm.top1=high", "llm.top1=nan"])
def test_bad_limits_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="--gate"):
        judge.parse_limit(text)


def test_limits_are_spelled_name_equals_number() -> None:
    assert judge.parse_limit("quality.llm.kl=0.5") == ("quality.llm.kl", 0.5)
    with pytest.raises(UsageError, match=r"llm\.topp1.*known are.*llm\.top1"):
        judge.GateOptions(limits={"llm.topp1": 1})


def test_altered_tensors_are_named() -> None:
    figures = {"fidelity": {"llm.altered": 1}}
    report = judge.judge(
        figures,  # type: ignore[arg-type]
        PRECISIONS,
        trained=True,
        options=judge.GateOptions(),
        details={"altered": ["llm/body:body.layers.0.mlp.gate_up.codes"]},
    )
    with pytest.raises(GateError, match=r"gate_up\.codes"):
        report.enforce()


def test_infinite_figures_are_written_as_text() -> None:
    assert judged({"fidelity": {"codec.si_sdr": math.inf}}).to_dict()["fidelity"]["codec.si_sdr"]["value"] == "inf"


def test_wrong_kernels_are_counted() -> None:
    int4, dynamic = Scheme("int4", 32), Scheme("int8_dynamic")
    assert figures.wrong_kernels([int4], {"MatMulNBits:bits=4:acc=4": 9}) == 0
    assert figures.wrong_kernels([int4], {"MatMulNBits:bits=4:acc=4": 8, "MatMulNBits:bits=4:acc=0": 1}) == 1
    assert figures.wrong_kernels([int4], {"MatMul:constant": 9}) == 10  # nine float ones, and not one as asked for
    assert figures.wrong_kernels([dynamic], {"DynamicQuantizeMatMul": 3, "MatMul": 2}) == 0
    assert figures.wrong_kernels([dynamic], {"DynamicQuantizeMatMul": 3, "MatMulInteger": 1}) == 1
    assert figures.wrong_kernels([dynamic, int4], {"DynamicQuantizeMatMul": 3}) == 1


def test_probe_is_repeatable_and_speaks() -> None:
    sound = teacher_forcing.probe(FrontEndSpec(), 2.0, seed=1)
    np.testing.assert_array_equal(sound, teacher_forcing.probe(FrontEndSpec(), 2.0, seed=1))
    assert sound.shape == (32000,) and 0.1 < np.abs(sound).max() < 1


@pytest.mark.parametrize("context", [24, 128, 2048])
def test_scripts_give_every_head_its_positions(tiny_model: Any, context: int) -> None:
    spec = replace(tiny_model.spec, context=context)
    scripts = teacher_forcing.scripts(spec, np.zeros((100, spec.body.width), np.float32))
    assert sum(s.frames + s.frames // 2 for s in scripts) >= 200
    assert all(len(s.features) >= 1 and len(s.features) + 3 + s.frames <= context for s in scripts)


def test_the_other_side_walks_the_same_calls(tiny_model: Any) -> None:
    """Fed its own ids again, the reference says the same; what it says to other features differs."""
    from edgeomni.runtimes.torch.llm import TorchLanguageModel

    llm, spec = TorchLanguageModel(tiny_model), tiny_model.spec
    rng = np.random.default_rng(0)
    script = teacher_forcing.Script(rng.standard_normal((9, spec.body.width)).astype(np.float32), frames=12, seed=3)
    spoken, said = teacher_forcing.speak(llm, spec, script)
    again = teacher_forcing.follow(llm, spec, spoken)
    np.testing.assert_array_equal(again.text, said.text)
    np.testing.assert_array_equal(again.audio, said.audio)
    assert said.text.shape == (18 + 1, spec.layout.text_vocab)  # 7 frames of two rows, 5 of one
    other = teacher_forcing.follow(llm, spec, replace(spoken, features=-spoken.features))
    assert not np.allclose(other.text, said.text)


def test_emitted_codes_are_valid_and_keep_what_was(tiny_model: Any) -> None:
    spec = tiny_model.spec
    k, codebook = spec.layout.streams, spec.codec.codebook_size
    ids = np.random.default_rng(0).integers(0, codebook + 8, (30, k + 1)).astype(np.int32)
    script = teacher_forcing.Script(np.zeros((1, 1), np.float32), 30, 0, tuple(ids))
    codes = teacher_forcing.emitted_codes(spec, [script])
    assert [len(c) for c in codes] == [(30 - k) * n for n in spec.codec.ids_per_level]
    assert all((c >= 0).all() and (c < codebook).all() for c in codes)
    first = codes[0]
    kept = ids[1 : 1 + len(first), 0]
    np.testing.assert_array_equal(first[kept < codebook], kept[kept < codebook])
