"""Greedy answers of every engine against the published code's, to the last token (tests/golden)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeomni import AudioChunk, Session, TurnEnd
from edgeomni.bundle import Bundle
from edgeomni.convert import export_bundle
from edgeomni.evaluate.gate import GateOptions
from edgeomni.sampling import Sampling
from edgeomni.spec import AUDIO_OUT

GREEDY = Sampling(greedy=True)
TASKS = {"aa": "AA", "at": "AT", "asr": "ASR", "ta": "TA", "tt": "TT", "two-row aa": "BATCH", "stream": "STREAM"}


@pytest.fixture(scope="module", params=["torch", "onnxruntime", "portable"])
def session(request: pytest.FixtureRequest, golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    if request.param == "torch":
        return Session.open(golden_dir)
    flavour = "portable" if request.param == "portable" else "ort"
    out = tmp_path_factory.mktemp("parity") / flavour
    export_bundle(golden_dir, out, precision="fp32", flavour=flavour, gate=GateOptions())
    return Session.open(Bundle.open(out))


def end_of(session: Session, task: str, golden_dir: Path, meta: dict[str, object], **kwargs: object) -> TurnEnd:
    question = {"audio": golden_dir / "question.wav"} if task[0] == "a" else {"text": meta["text"]}
    events = session.respond(task, sampling=GREEDY, max_length=meta["max_returned_tokens"], **question, **kwargs)  # type: ignore[arg-type]
    end = list(events)[-1]
    assert isinstance(end, TurnEnd)
    return end


@pytest.mark.parametrize("name", TASKS)
def test_greedy_streams_are_exact(
    name: str, session: Session, golden_dir: Path, golden: dict[str, np.ndarray], meta: dict[str, object]
) -> None:
    two_row = TASKS[name] in ("BATCH", "STREAM")
    task = "aa" if two_row else name
    end = end_of(session, task, golden_dir, meta, two_row=two_row)
    expected = golden[f"{TASKS[name]}_tokens"]
    np.testing.assert_array_equal(end.tokens if task in AUDIO_OUT else end.tokens[-1], expected)


def test_the_streamed_wave_is_the_offline_decode(
    session: Session, golden_dir: Path, golden: dict[str, np.ndarray], meta: dict[str, object]
) -> None:
    codebook = session.spec.layout.codebook_size
    if (golden["AA_codes2"] >= codebook).any():
        pytest.fail("the golden answer holds no decodable codes")
    events = list(
        session.respond("aa", golden_dir / "question.wav", sampling=GREEDY, two_row=False,
                        max_length=int(str(meta["max_returned_tokens"])))
    )  # fmt: skip
    wave = np.concatenate([e.samples for e in events if isinstance(e, AudioChunk)])
    np.testing.assert_allclose(wave, golden["AA_wave"], atol=1e-4)
