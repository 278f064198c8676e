"""Sessions on a real exported bundle: shared weights, concurrent turns, cancel, noise, the shorter window."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from edgeomni import AudioChunk, Bundle, Sampling, Session, TurnEnd
from edgeomni.errors import EngineError, UsageError
from edgeomni.export import export_bundle
from edgeomni.interrupt import Interrupt

QUESTION = (0.2 * np.sin(np.arange(24000) * 0.05) * np.sin(np.arange(24000) * 0.0007)).astype(np.float32)


@pytest.fixture(scope="module")
def bundle(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(tiny_model, tmp_path_factory.mktemp("session") / "bundle", precision="int4")


def answer(session: Session, **kwargs: Any) -> tuple[np.ndarray, TurnEnd]:
    codes = np.random.default_rng(5).integers(0, session.spec.codec.codebook_size, (12, 7))
    events = list(session.respond("aa", QUESTION, forced_codes=codes, forced_text_end=6, **kwargs))
    assert isinstance(events[-1], TurnEnd)
    return np.concatenate([e.samples for e in events if isinstance(e, AudioChunk)]), events[-1]


def test_sessions_of_one_bundle_share_its_weights_and_answer_side_by_side(bundle: Bundle) -> None:
    first, second = Session.open(bundle), Session.open(bundle)
    assert first.components is second.components
    sampling = [Sampling(temperature=1.0, top_k=20, seed=seed) for seed in (1, 2)]
    alone = [answer(s, sampling=how) for s, how in zip((first, second), sampling, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(answer, s, sampling=how) for s, how in zip((first, second), sampling, strict=True)]
        together = [job.result() for job in jobs]
    for (wave, end), (same_wave, same_end) in zip(alone, together, strict=True):
        np.testing.assert_array_equal(end.tokens, same_end.tokens)
        np.testing.assert_allclose(wave, same_wave, atol=1e-6)


def test_a_turn_leaves_nothing_behind_for_the_next(bundle: Bundle) -> None:
    session = Session.open(bundle)
    before = answer(session)
    next(session.respond("ta", text="one two three", max_length=40))
    events = session.respond("aa", QUESTION)
    next(events)
    session.cancel()
    assert [e.reason for e in events if isinstance(e, TurnEnd)] == ["cancelled"]
    after = answer(session)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1].tokens, after[1].tokens)


def test_codec_noise_is_off_by_default_and_seedable(bundle: Bundle) -> None:
    session = Session.open(bundle)
    clean, noisy, again = answer(session)[0], answer(session, noise_seed=1)[0], answer(session, noise_seed=1)[0]
    other = answer(session, noise_seed=2)[0]
    np.testing.assert_array_equal(noisy, again)
    assert np.abs(clean - noisy).max() > 1e-4 and np.abs(other - noisy).max() > 1e-4


def test_a_short_window_gives_as_many_features(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, seen = Session.open(bundle), []
    encode = session.components.encoder.encode

    def noted(mel: np.ndarray, wanted: int, interrupt: Interrupt) -> np.ndarray:
        features = encode(mel, wanted, interrupt)
        seen.append((mel.shape[1], len(features)))
        return features

    monkeypatch.setattr(session.components.encoder, "encode", noted)
    for window in (None, "auto", 10):
        answer(session, encoder_window=window)
    assert seen == [(3000, 76), (200, 76), (1000, 76)]


def test_the_wrong_engine_or_device_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="unknown engine 'steam'; known are onnxruntime, llama.cpp"):
        Session.open(bundle, engine="steam")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="encoder is onnx, which torch does not run; engines that do: onnxruntime"):
        Session.open(bundle, engine="torch")
    with pytest.raises(EngineError, match="CUDAExecutionProvider.*onnxruntime-gpu"):
        Session.open(bundle, device="cuda")


def test_a_bundle_in_an_unknown_format_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    manifest = copy / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"format": "onnx"', '"format": "npu9"', 1))
    with pytest.raises(EngineError, match="npu9"):
        Session.open(copy)


def test_a_checkpoint_on_a_missing_device_is_named(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="sees no CUDA device"):
        Session.open(tiny_dir, device="cuda")


def test_a_checkpoint_tells_that_it_runs_on_torch(tiny_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "edgeomni")
    with Session.open(tiny_dir, engine="torch") as session:
        assert session.spec.context == 2048
    assert "all components run on torch on cpu (checkpoint:fp32)" in [r.message for r in caplog.records]
