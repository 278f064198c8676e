"""What the gate measures: one wrong part among right ones must show, in the figure that is meant for it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
import torch

from edgeomni import runtimes
from edgeomni.arrays import F32, I64
from edgeomni.bundle import Bundle
from edgeomni.components import Components
from edgeomni.errors import BundleError, GateError
from edgeomni.export import export_bundle
from edgeomni.gate import figures, reference, run, teacher_forcing
from edgeomni.gate.metrics import si_sdr
from edgeomni.model import checkpoints, fake_quant
from edgeomni.runtimes.torch import TorchCodec, TorchEncoder, TorchLanguageModel

HEADS = ["text", *(f"audio{k}" for k in range(7))]
MEL_LENGTHS = (400, 120)


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer positions than the real gate has, which make the same points in a quarter of the time."""
    monkeypatch.setattr(teacher_forcing, "_FRAMES", 24)
    monkeypatch.setattr(teacher_forcing, "_POSITIONS", 60)


class NoisyLlm(TorchLanguageModel):
    """torch's LLM; `noise` adds that many standard deviations of repeatable noise to one head's logits, or to all."""

    def __init__(self, model: Any, noise: float = 0.0, head: str | None = None) -> None:
        super().__init__(model)
        self.noise, self.head = noise, head

    def text_logits(self, hidden: Any, row: int) -> F32:
        return self._spoilt(super().text_logits(hidden, row), "text")

    def audio_logits(self, hidden: Any, row: int, given: I64 | None = None) -> F32:
        logits = super().audio_logits(hidden, row, given)
        return np.stack([self._spoilt(rows, f"audio{k}") for k, rows in enumerate(logits)])

    def _spoilt(self, logits: F32, head: str) -> F32:
        if self.noise == 0 or self.head not in (None, head):
            return logits
        rng = np.random.default_rng(int(np.abs(logits[:8]).sum() * 1e4))
        drawn: F32 = rng.standard_normal(logits.shape).astype(np.float32)
        return np.asarray(logits + self.noise * logits.std() * drawn, np.float32)


class WrongEncoder(TorchEncoder):
    """torch's encoder, wrong for windows of one length only."""

    def __init__(self, model: Any, wrong_length: int) -> None:
        super().__init__(model)
        self.wrong_length = wrong_length

    def encode(self, mel: F32, wanted: int | None = None, interrupt: Any = None) -> F32:
        features = super().encode(mel, wanted, interrupt)
        return features[::-1].copy() if mel.shape[1] == self.wrong_length else features


class HoarseCodec(TorchCodec):
    """torch's codec, its samples rounded to steps of a tenth."""

    def decode(self, codes: Any, state: Any, last: bool) -> F32:
        return np.round(super().decode(codes, state, last), 1)


def sides(model: Any, exported: Components, *, exact: Any = None, rounds: bool = False, **contexts: Any) -> Any:
    plain = fake_quant.offline_codec(model)
    side = figures.TorchSide(
        encoder=TorchEncoder(model),
        llm=NoisyLlm(model),
        encoder_exported=nullcontext,
        llm_exported=nullcontext,
        llm_exact=nullcontext,
        llm_shaken=nullcontext,
        decode=plain,
        decode_stored=plain,
        decode_double=fake_quant.double_codec(model),
    )
    return figures.Sides(model.spec, replace(side, **contexts), exported, exact, rounds)


def honest(model: Any, **changes: Any) -> Components:
    return replace(Components(TorchEncoder(model), NoisyLlm(model), TorchCodec(model)), **changes)


def measured(both: Any) -> figures.Measured:
    rng = np.random.default_rng(0)
    mels = [rng.standard_normal((both.spec.front_end.n_mels, t)).astype(np.float32) for t in MEL_LENGTHS]
    out = figures.Measured()
    figures.measure(both, mels, out)
    return out


def test_an_honest_export_has_perfect_figures(tiny_model: Any) -> None:
    out = measured(sides(tiny_model, honest(tiny_model)))
    fidelity, quality = out.figures["fidelity"], out.figures["quality"]
    assert fidelity["encoder.cosine"] == pytest.approx(1) and quality["encoder.cosine"] == pytest.approx(1)
    assert (fidelity["llm.top1"], fidelity["llm.near_ties"], fidelity["llm.error"]) == (1, 0, 0)
    assert quality["llm.kl"] == pytest.approx(0, abs=1e-9) and quality["llm.top1"] == 1
    assert fidelity["codec.si_sdr"] > 80 and quality["codec.log_mel"] < 1e-3
    assert "llm.excess" not in fidelity, "only kernels that round their inputs have one"
    assert out.details["llm"]["positions"] >= 60 and list(out.details["llm"]["heads"]) == HEADS


@pytest.mark.parametrize("head", ["text", "audio0", "audio3", "audio6"])
@pytest.mark.parametrize("has_exact_mode", [True, False])
def test_one_bad_head_of_eight_shows(tiny_model: Any, head: str, has_exact_mode: bool) -> None:
    bad = NoisyLlm(tiny_model, noise=3.0, head=head)
    both = sides(tiny_model, honest(tiny_model, llm=bad), exact=bad if has_exact_mode else None)
    out = measured(both)
    fidelity, quality, heads = out.figures["fidelity"], out.figures["quality"], out.details["llm"]["heads"]
    assert fidelity["llm.top1"] == heads[head]["top1"] < 0.5
    assert fidelity["llm.error"] == heads[head]["error"] == pytest.approx(3.0, rel=0.1)
    assert quality["llm.top1"] == heads[head]["quality"]["top1"] < 0.5
    assert quality["llm.kl"] == heads[head]["quality"]["kl"] > 0.5
    assert all(heads[other]["top1"] == 1 and heads[other]["error"] == 0 for other in HEADS if other != head)


def test_fidelity_judges_the_exact_mode_and_quality_the_kernels(tiny_model: Any) -> None:
    both = sides(tiny_model, honest(tiny_model, llm=NoisyLlm(tiny_model, 3.0)), exact=NoisyLlm(tiny_model))
    out = measured(both)
    assert out.figures["fidelity"]["llm.top1"] == 1 and out.figures["quality"]["llm.top1"] < 0.5


def test_noise_smaller_than_a_rounding_is_a_near_tie_and_no_disagreement(tiny_model: Any) -> None:
    """The noise turns choices between ids whose logits lie within 0.4 % of the spread, and no others."""
    quiet = NoisyLlm(tiny_model, noise=5e-4)
    out = measured(sides(tiny_model, honest(tiny_model, llm=quiet), exact=quiet))
    assert out.figures["fidelity"]["llm.top1"] == 1
    assert out.figures["fidelity"]["llm.error"] == pytest.approx(5e-4, rel=0.1)
    loud = NoisyLlm(tiny_model, noise=0.2)
    out = measured(sides(tiny_model, honest(tiny_model, llm=loud), exact=loud))
    assert out.figures["fidelity"]["llm.top1"] < 1, "noise far above the near-tie limit counts"


@pytest.mark.parametrize("wrong", MEL_LENGTHS)
def test_one_bad_window_shows(tiny_model: Any, wrong: int) -> None:
    out = measured(sides(tiny_model, honest(tiny_model, encoder=WrongEncoder(tiny_model, wrong))))
    assert out.figures["fidelity"]["encoder.cosine"] < 0.99 and out.figures["quality"]["encoder.cosine"] < 0.99
    windows = out.details["encoder"]["cosine by window (fidelity, quality)"]
    assert [length for length, (faithful, _) in windows.items() if faithful < 0.99] == [str(wrong)]


def test_a_hoarse_codec_shows(tiny_model: Any) -> None:
    out = measured(sides(tiny_model, honest(tiny_model, codec=HoarseCodec(tiny_model))))
    assert out.figures["fidelity"]["codec.si_sdr"] < 30 and out.figures["quality"]["codec.log_mel"] > 0.05


@pytest.mark.parametrize(("error", "noise", "excess"), [(0.02, 0.01, 2.0), (0.01, 0.04, 0.25), (0.01, 0.0, 10.0)])
def test_excess_is_the_kernels_error_in_units_of_rounding(
    tiny_model: Any, error: float, noise: float, excess: float
) -> None:
    """The noise of rounding counts as a thousandth of the spread at least, so that 0.01 over nothing is 10."""
    both = sides(tiny_model, honest(tiny_model, llm=NoisyLlm(tiny_model, error)), rounds=True)

    @contextmanager
    def shaken() -> Iterator[None]:
        both.torch.llm.noise = noise
        yield
        both.torch.llm.noise = 0.0

    out = measured(replace(both, torch=replace(both.torch, llm_shaken=shaken)))
    assert out.figures["fidelity"]["llm.excess"] == pytest.approx(excess, rel=0.15)


def test_the_excess_is_that_of_the_worst_head(tiny_model: Any) -> None:
    exported = honest(tiny_model, llm=NoisyLlm(tiny_model, 0.01, head="audio3"))
    out = measured(sides(tiny_model, exported, rounds=True))
    heads = out.details["llm"]["heads"]
    assert out.figures["fidelity"]["llm.excess"] == pytest.approx(10, rel=0.15)
    assert heads["audio3"]["rounded_error"] == pytest.approx(0.01, rel=0.15) and heads["text"]["rounded_error"] == 0


def test_near_ties_are_those_of_the_worst_head() -> None:
    """One head of three prefers its choice by 0.3 % of the spread at one position of four; the other side turns it."""
    rng = np.random.default_rng(0)
    text, audio = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 50), (4, 2, 50)))
    audio[2, 1, 7] = audio[2, 1].max() + 5
    audio[2, 1, 9] = audio[2, 1, 7] - 0.003 * audio[:, 1].std()
    other = audio.copy()
    other[2, 1, [7, 9]] = other[2, 1, [9, 7]]
    out = figures.Measured()
    figures._faithful(teacher_forcing.Logits(text, audio), teacher_forcing.Logits(text, other), out)
    assert out.figures["fidelity"]["llm.near_ties"] == 0.25 and out.figures["fidelity"]["llm.top1"] == 1
    assert [h["near_ties"] for h in out.details["llm"]["heads"].values()] == [0, 0, 0.25]


def test_what_float32_can_reach_is_measured_on_the_same_codec(tiny_model: Any) -> None:
    both = sides(tiny_model, honest(tiny_model))
    out = measured(both)
    own = out.details["codec"]["torch against float64, dB"]
    assert out.within_reach == {"codec.si_sdr": own - 20}
    assert 80 < own < 180, "float32 is near float64 and not equal to it"


@pytest.mark.parametrize("kind", ["snac", "mimi"])
def test_the_float64_yardstick_is_float64_and_leaves_the_model_alone(kind: str, tmp_path: Path) -> None:
    make = {"snac": parts.snac, "mimi": parts.mimi}[kind]
    model = checkpoints.compose(
        str(parts.whisper(tmp_path / "w")), str(parts.llm(tmp_path / "l")), str(make(tmp_path / "c"))
    )
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, model.spec.codec.codebook_size, 12 * n) for n in model.spec.codec.ids_per_level]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = fake_quant.offline_codec(model)
    single = plain(codes)  # fills Mimi's cache of its codebook in float32
    double = fake_quant.double_codec(model)(codes)
    twin = copy.deepcopy(model.codec).double()
    for module in twin.modules():
        if hasattr(module, "_embed"):
            module._embed = None
    expected = checkpoints_decode(twin, codes)
    assert double.dtype == np.float64 and single.dtype == np.float32
    np.testing.assert_array_equal(double, expected)
    assert 60 < si_sdr(double, single) < 200
    np.testing.assert_array_equal(plain(codes), single)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def checkpoints_decode(codec: Any, codes: list[I64]) -> np.ndarray:
    from edgeomni.model import codecs

    return np.asarray(codecs.decode(codec, [torch.from_numpy(c)[None] for c in codes]).numpy())


# --- recorded outputs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(tiny_model, tmp_path_factory.mktemp("recorded") / "bundle", precision="int4", threads=1)


def replayed(bundle: Bundle, **changes: Any) -> dict[str, float]:
    report = run.replayed(bundle, replace(runtimes.open_components(bundle), **changes))
    return {f.name: f.value for f in report.figures if not f.passed}


class ShiftedLlm:
    """The bundle's own LLM, one head's first choice moved up by `bonus` standard deviations at another id."""

    def __init__(self, llm: Any, head: int, bonus: float) -> None:
        self._llm, self._head, self._bonus = llm, head, bonus

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def audio_logits(self, hidden: Any, row: int, given: I64 | None = None) -> F32:
        logits: F32 = self._llm.audio_logits(hidden, row, given)
        logits[self._head, 5] += self._bonus * logits[self._head].std()
        return logits


def test_the_machine_that_recorded_agrees_with_itself(bundle: Bundle) -> None:
    assert replayed(bundle) == {}
    report = run.replayed(bundle, runtimes.open_components(bundle))
    values = {f.name: f.value for f in report.figures}
    assert values["llm.top1"] == 1 and values["llm.near_ties"] == 0 and values["encoder.cosine"] > 0.999999
    then, now = report.details["engines"]["then"], report.details["engines"]["now"]
    assert then == now and list(now) == ["onnxruntime"]


@pytest.mark.parametrize("head", [0, 6])
def test_a_machine_that_chooses_otherwise_misses(bundle: Bundle, head: int) -> None:
    llm = runtimes.open_components(bundle).llm
    missed = replayed(bundle, llm=ShiftedLlm(llm, head, bonus=20.0))
    assert list(missed) == ["llm.top1"] and missed["llm.top1"] < 0.1


def test_other_components_are_judged_too(bundle: Bundle, tiny_model: Any) -> None:
    short = max(2, 2 * tiny_model.spec.encoder.context // 6 * 2)
    assert list(replayed(bundle, encoder=WrongEncoder(tiny_model, short))) == ["encoder.cosine"]
    assert list(replayed(bundle, codec=HoarseCodec(tiny_model))) == ["codec.si_sdr"]


def test_the_recording_is_a_listed_file_and_no_part_of_the_digest(bundle: Bundle, tmp_path: Path) -> None:
    assert bundle.manifest.reference is not None
    assert bundle.manifest.reference.path in {entry.path for entry in bundle.entries()}
    without = replace(bundle.manifest, reference=None)
    assert Bundle(bundle.path, without).digest == bundle.digest


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "none"])
def test_a_recording_that_cannot_be_used_is_named(bundle: Bundle, tmp_path: Path, damage: str) -> None:
    copied = Path(shutil.copytree(bundle.path, tmp_path / "copy"))
    path = copied / reference.FILE
    manifest = bundle.manifest
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "foreign":
        np.savez(path, mel=np.zeros((80, 10), np.float32))
    else:
        manifest = replace(manifest, reference=None)
    broken = Bundle(copied, manifest)
    with pytest.raises(BundleError):
        run.replayed(broken, runtimes.open_components(bundle))


def test_another_engine_version_is_told_when_the_bundle_is_opened(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    runtimes.open_components(bundle)
    assert not caplog.records
    other = replace(bundle.manifest, gate={**bundle.manifest.gate, "engines": {"onnxruntime": "1.2.3"}})
    runtimes.open_components(Bundle(bundle.path, other))
    (told,) = [record.getMessage() for record in caplog.records]
    assert "onnxruntime 1.2.3" in told and f"edgeomni verify {bundle.path} --gate" in told


def test_decided_counts_disagreements_and_near_ties_apart() -> None:
    ids = np.array([[3, 1, 2], [3, 1, 2], [3, 1, 2], [3, 1, 2]], np.int32)
    logits = np.array([[9.0, 8.9, 5.0]] * 4, np.float32)
    chosen = np.array([3, 1, 2, 7])  # the same, a near-tie, a real difference, an id that was not kept
    top1, ties = reference.decided(ids, logits, chosen, tolerance=0.2)
    assert (top1, ties) == (0.5, 0.25)
    assert reference.decided(ids, logits, chosen, tolerance=0.05) == (0.25, 0.0)
    assert reference.decided(ids, logits, chosen, tolerance=100.0) == (0.75, 0.5)


def test_a_report_of_the_device_says_what_to_do(bundle: Bundle) -> None:
    llm = ShiftedLlm(runtimes.open_components(bundle).llm, 2, bonus=20.0)
    report = run.replayed(bundle, replace(runtimes.open_components(bundle), llm=llm))
    with pytest.raises(GateError, match=r"this device missed its gate: device llm\.top1 is .*use the engine"):
        report.enforce("this device", "use the engine version that judged the bundle")
