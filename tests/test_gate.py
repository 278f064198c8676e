"""Thresholds, verdicts, spellings; and teacher forcing on scripted components."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgeomni.bundle import Component
from edgeomni.errors import GateError, UsageError
from edgeomni.gate import judge, teacher_forcing
from edgeomni.gate.judge import Graded
from edgeomni.quantize.schemes import Scheme
from edgeomni.runtimes.onnxruntime.kernel_check import count_wrong
from edgeomni.spec import FrontEndSpec

GRADED = {"encoder": Graded("int8", 8), "llm": Graded("int4", 4), "codec": Graded("fp32", 32)}
GOOD: dict[judge.Part, dict[str, float]] = {
    "fidelity": {
        "encoder.altered": 0,
        "llm.altered": 0,
        "codec.altered": 0,
        "encoder.cosine": 0.9995,
        "llm.top1": 1.0,
        "llm.near_ties": 0.0,
        "llm.error": 1e-4,
        "codec.si_sdr": 90.0,
    },
    "quality": {"encoder.cosine": 0.995, "llm.kl": 0.1, "llm.top1": 0.8, "codec.log_mel": 0.001},
}


def good(**changes: float | None) -> dict[judge.Part, dict[str, float]]:
    """All figures good but those given, named "quality__llm_kl"; None leaves one out."""
    figures = {part: dict(values) for part, values in GOOD.items()}
    for name, value in changes.items():
        part, _, rest = name.partition("__")
        key = rest.replace("_", ".", 1)
        if value is None:
            del figures[part][key]  # type: ignore[index]
        else:
            figures[part][key] = value  # type: ignore[index]
    return figures


def judged(figures: dict[judge.Part, dict[str, float]], **how: Any) -> judge.Report:
    return judge.judge(figures, how.pop("graded", GRADED), trained=how.pop("trained", True), **how)


def missed(*args: Any, **how: Any) -> list[str]:
    return [f"{f.part} {f.name}" for f in judged(*args, **how).missed]


def test_good_figures_pass() -> None:
    report = judged(good())
    assert report.missed == []
    report.enforce()
    assert report.to_dict()["passed"] is True


@pytest.mark.parametrize(
    ("figure", "bad"),
    [
        ("fidelity__encoder_cosine", 0.9989),
        ("fidelity__llm_top1", 0.994),
        ("fidelity__llm_near_ties", 0.021),
        ("fidelity__llm_error", 0.0031),
        ("fidelity__llm_excess", 2.1),
        ("fidelity__codec_si_sdr", 59.0),
        ("fidelity__codec_si_sdr", math.nan),
        ("fidelity__encoder_altered", 1),
        ("fidelity__llm_altered", 1),
        ("fidelity__codec_altered", 1),
        ("fidelity__encoder_wrong_kernels", 1),
        ("fidelity__llm_wrong_kernels", 1),
        ("quality__encoder_cosine", 0.98),
        ("quality__llm_kl", 0.51),
        ("quality__llm_top1", 0.59),
        ("quality__codec_log_mel", 0.011),
    ],
)
def test_each_miss_is_named_with_exit_code_3(figure: str, bad: float) -> None:
    report = judged(good(**{figure: bad}))
    part, _, rest = figure.partition("__")
    name = rest.replace("_", ".", 1)
    assert [(f.part, f.name) for f in report.missed] == [(part, name)]
    with pytest.raises(GateError, match=name.replace(".", r"\.")) as caught:
        report.enforce()
    assert caught.value.exit_code == 3
    assert report.to_dict()["passed"] is False


def test_a_miss_is_told_with_its_value_its_limit_and_what_to_do() -> None:
    with pytest.raises(GateError) as caught:
        judged(good(fidelity__llm_top1=0.994, quality__llm_kl=0.75)).enforce()
    said = str(caught.value)
    assert said.startswith("the export missed its gate: fidelity llm.top1 is 0.994, wanted ≥ 0.995; ")
    assert "quality llm.kl is 0.75, wanted ≤ 0.5" in said and "Nothing was kept; choose a higher precision" in said
    with pytest.raises(GateError, match=r"this device missed .*\. Do this$"):
        judged(good(fidelity__llm_top1=0.994)).enforce("this device", "Do this")


# --- what the gate does not know, it does not pass ------------------------------------------------------------------


def test_no_figures_at_all_are_no_pass() -> None:
    everything = [f"{part} {name}" for part, values in GOOD.items() for name in values]
    assert sorted(missed({})) == sorted(missed({"fidelity": {}, "quality": {}})) == sorted(everything)


@pytest.mark.parametrize("figure", [f"{p}__{n.replace('.', '_', 1)}" for p, values in GOOD.items() for n in values])
def test_a_mandatory_figure_that_was_not_measured_is_a_miss(figure: str) -> None:
    report = judged(good(**{figure: None}))
    part, _, rest = figure.partition("__")
    assert [(f.part, f.name) for f in report.missed] == [(part, rest.replace("_", ".", 1))]
    with pytest.raises(GateError, match="was not measured"):
        report.enforce()


def test_a_misspelt_figure_is_a_miss() -> None:
    assert missed(good(fidelity__llm_topp1=1.0)) == ["fidelity llm.topp1"]
    assert missed(good(fidelity__mouth_cosine=1.0)) == ["fidelity mouth.cosine"]
    assert missed({**GOOD, "taste": {"llm.top1": 1.0}}) == ["taste llm.top1"]  # type: ignore[dict-item]


def test_excess_is_demanded_where_kernels_round_their_inputs() -> None:
    assert missed(good(), expected=["llm.excess"]) == ["fidelity llm.excess"]
    assert missed(good(fidelity__llm_excess=1.1), expected=["llm.excess"]) == []


def test_a_precision_that_nobody_knows_is_judged_by_its_bits() -> None:
    """q4_k_m stores about 4.5 bits: the limits of 4 bits hold for it, and nothing passes for want of a limit."""
    strange = {**GRADED, "llm": Graded("q4_k_m", 4.5)}
    assert missed(good(), graded=strange) == []
    assert missed(good(fidelity__llm_top1=0.0, fidelity__llm_altered=99), graded=strange) == [
        "fidelity llm.altered",
        "fidelity llm.top1",
    ]


def test_fewer_bits_than_any_limit_knows_are_a_miss_everywhere() -> None:
    names = missed(good(), graded={**GRADED, "llm": Graded("int2", 2)})
    assert names == [f"{part} {name}" for part, values in GOOD.items() for name in values if name.startswith("llm.")]


@pytest.mark.parametrize(
    ("bits", "bit_class"),
    [
        (32, "bits32"),
        (31.9, "bits16"),
        (16, "bits16"),
        (8.5, "bits8"),
        (8, "bits8"),
        (7.9, "bits4"),
        (4, "bits4"),
        (3.9, None),
        (0, None),
    ],
)
def test_limits_go_by_the_bits_that_are_really_there(bits: float, bit_class: str | None) -> None:
    assert Graded("any", bits).bit_class == bit_class


def test_a_component_is_graded_by_its_poorest_weights() -> None:
    entry = Component("llm", "onnxruntime", "onnx", "int4", {"body.linear": "int4_b32", "text_head": "int8_b128"}, {})
    assert Graded.of(entry) == Graded("int4", 4)
    assert Graded.of(replace(entry, scheme={})).bit_class is None


def test_thresholds_follow_the_precision() -> None:
    assert missed(good(), graded={**GRADED, "encoder": Graded("fp32", 32)}) == [
        "fidelity encoder.cosine",
        "quality encoder.cosine",
    ]


# --- what counts, and what changes a limit --------------------------------------------------------------------------


def test_random_weights_are_recorded_but_their_quality_is_not_judged() -> None:
    assert missed(good(quality__llm_kl=9.0)) == ["quality llm.kl"]
    report = judged(good(quality__llm_kl=9.0), trained=False)
    assert report.missed == []
    entry = report.to_dict()["quality"]["llm.kl"]
    assert (entry["value"], entry["verdict"]) == (9.0, "not judged: random weights")


def test_fidelity_is_judged_for_random_weights_too() -> None:
    assert missed(good(fidelity__llm_top1=0.5), trained=False) == ["fidelity llm.top1"]


def test_limits_can_be_replaced() -> None:
    def under(limits: dict[str, float], **changes: float) -> list[str]:
        return missed(good(**changes), options=judge.GateOptions(limits=limits))

    assert under({"llm.top1": 0.9}, fidelity__llm_top1=0.9) == []
    assert under({"llm.top1": 0.9}, fidelity__llm_top1=0.89) == ["fidelity llm.top1"]
    assert under({"quality.llm.kl": 0.05}) == ["quality llm.kl"]
    assert under({"quality.llm.top1": 0.81}) == ["quality llm.top1"], "the two figures called llm.top1 are told apart"


def test_what_float32_can_reach_lowers_a_limit_and_never_raises_one() -> None:
    poor = good(fidelity__codec_si_sdr=40.0)
    assert missed(poor, within_reach={"codec.si_sdr": 30.0}) == []
    assert missed(poor, within_reach={"codec.si_sdr": 41.0}) == ["fidelity codec.si_sdr"]
    assert missed(good(), within_reach={"codec.si_sdr": 130.0}) == [], "90 dB pass the limit of 60"
    assert missed(good(quality__llm_top1=0.5), within_reach={"llm.top1": 0.1}) == ["quality llm.top1"]
    assert missed(good(fidelity__llm_error=0.01), within_reach={"llm.error": 1e-9}) == ["fidelity llm.error"]


def test_the_limits_are_those_that_were_asked_for() -> None:
    limits = {(f.part, f.name): f.limit for f in judged(good()).figures}
    fidelity = limits["fidelity", "encoder.cosine"], limits["fidelity", "llm.top1"], limits["fidelity", "codec.si_sdr"]
    assert fidelity == (0.999, 0.995, 60)


def test_every_figure_says_what_it_means() -> None:
    assert set(judge.meanings()) == set(judge.known_names())
    assert all(len(text.split()) > 5 for text in judge.meanings().values())


@pytest.mark.parametrize("text", ["llm.top1", "llm.top1=", "llm.top1=high", "llm.top1=nan"])
def test_bad_limits_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="--gate"):
        judge.parse_limit(text)


def test_limits_are_spelled_name_equals_number() -> None:
    assert judge.parse_limit("quality.llm.kl=0.5") == ("quality.llm.kl", 0.5)
    with pytest.raises(UsageError, match=r"llm\.topp1.*known are.*llm\.top1"):
        judge.GateOptions(limits={"llm.topp1": 1})


def test_altered_tensors_are_named() -> None:
    report = judged(good(fidelity__llm_altered=1), details={"altered": ["llm/body:body.layers.0.mlp.gate_up.codes"]})
    with pytest.raises(GateError, match=r"gate_up\.codes"):
        report.enforce()


def test_infinite_figures_are_written_as_text() -> None:
    assert judged(good(fidelity__codec_si_sdr=math.inf)).to_dict()["fidelity"]["codec.si_sdr"]["value"] == "inf"


def test_wrong_kernels_are_counted() -> None:
    int4, dynamic = Scheme("int4", 32), Scheme("int8_dynamic")
    assert count_wrong([int4], {"MatMulNBits:bits=4:acc=4": 9}) == 0
    assert count_wrong([int4], {"MatMulNBits:bits=4:acc=4": 8, "MatMulNBits:bits=4:acc=0": 1}) == 1
    assert count_wrong([int4], {"MatMul:constant": 9}) == 10  # nine float ones, and not one as asked for
    assert count_wrong([dynamic], {"DynamicQuantizeMatMul": 3, "MatMul": 2}) == 0
    assert count_wrong([dynamic], {"DynamicQuantizeMatMul": 3, "MatMulInteger": 1}) == 1
    assert count_wrong([dynamic, int4], {"DynamicQuantizeMatMul": 3}) == 1


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
