"""Prepared data against what the front end and the codec give directly; refusals, bad samples among good ones."""

from __future__ import annotations

import base64
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from edgeomni import audio
from edgeomni.arrays import F32, I64
from edgeomni.data.readers import DataSet, read_data
from edgeomni.data.sample import Clip, Sample
from edgeomni.errors import DataError
from edgeomni.spec import FrontEndSpec, OmniSpec
from edgeomni.text import Tokenizer
from edgeomni.train.dataset import Reader
from edgeomni.train.prepare import codec_digest, encode_codes, prepare
from edgeomni.train.prepared import MANIFEST, PreparedSamples, StoredMel, is_prepared, read_prepared

COUNT = 40
"""Samples of `data`: three shards."""
HALF_ULP = 2.0**-11
"""Of float16, relative to the value."""


def speech(seconds: float, rate: int, seed: int) -> F32:
    """Noise that swells and fades, at another loudness for each seed."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(size=round(seconds * rate)) * np.sin(np.linspace(0, np.pi, round(seconds * rate)))
    return np.asarray(samples * 10.0 ** -rng.uniform(0.7, 3), np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON Lines: spoken questions and answers, some as base64, some written, some with parts of recordings."""
    folder = tmp_path_factory.mktemp("data")
    lines: list[dict[str, Any]] = []
    for i in range(COUNT):
        soundfile.write(folder / f"q{i}.wav", speech(0.3 + 0.01 * i, 16000, i), 16000, subtype="FLOAT")
        soundfile.write(folder / f"a{i}.wav", speech(0.2 + 0.01 * i, 24000, 99 + i), 24000, subtype="FLOAT")
        lines.append({"audio": f"q{i}.wav", "text": f"question {i}", "answer": "yes", "answer_audio": f"a{i}.wav"})
    lines[1] |= {"audio": base64.b64encode((folder / "q1.wav").read_bytes()).decode()}
    lines[2] |= {"audio": ["q2.wav", "q3.wav:0.1-0.25"]}
    lines[3] = {
        "text": "written",
        "answer": "ja",
        "language": "de",
        "speaker": "s",
        "system": "",
        "history": [["a", "b"]],
    }
    lines[4] = {"task": "asr", "audio": "q4.wav", "text": "heard"}
    lines[5] |= {"answer_audio": None, "answer_codes": [[1, 2, 3, 4, 5, 6, 7], [0, 255, 0, 255, 0, 255, 0]]}
    (folder / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "t.jsonl"


@pytest.fixture(scope="module")
def prepared(data: Path, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> PreparedSamples:
    """`data`, prepared in one go in this process."""
    out = tmp_path_factory.mktemp("prepared") / "whole"
    manifest = prepare(read_data(data), tiny_model, out, workers=1)
    assert (manifest.samples, manifest.left_out, len(manifest.shards)) == (COUNT, [], 3)
    return read_prepared(out, tiny_model.spec, codec_digest(tiny_model.codec))


def with_spec(model: Any, **changes: Any) -> Any:
    """The same codec in a model of another spec."""
    return SimpleNamespace(spec=replace(model.spec, **changes), codec=model.codec, codec_config=model.codec_config)


def one(model: Any, out: Path, *samples: Sample, **how: Any) -> PreparedSamples:
    prepare(DataSet(list(samples), "native", [], "t"), model, out, workers=1, **how)
    return read_prepared(out, model.spec)


def windows(sample: Sample) -> list[F32]:
    if sample.mel is None:
        return []
    assert isinstance(sample.mel, StoredMel)
    return sample.mel.windows()


def same_up_to_float16(stored: F32, exact: F32) -> None:
    assert stored.dtype == np.float32 and stored.shape == exact.shape
    np.testing.assert_allclose(stored, exact, rtol=0, atol=HALF_ULP * max(1, np.abs(exact).max()))


class TestWhatIsStored:
    def test_texts(self, data: Path, prepared: PreparedSamples) -> None:
        names = ("where", "task", "text", "answer", "system", "language", "speaker", "history")
        for before, after in zip(read_data(data).samples, prepared, strict=True):
            assert [getattr(after, name) for name in names] == [getattr(before, name) for name in names]
            assert after.tasks() == before.tasks()

    def test_mels_are_those_of_the_padded_window(self, data: Path, prepared: PreparedSamples) -> None:
        front = FrontEndSpec()
        for before, after in zip(read_data(data).samples, prepared, strict=True):
            if not before.audio:
                assert after.mel is None
                continue
            heard = [np.concatenate([clip.read(front.sample_rate) for clip in before.audio])]  # asked as one sound
            for samples, stored in zip(heard, windows(after), strict=True):
                same_up_to_float16(stored, audio.log_mel(samples, front, 3000))
            assert isinstance(after.mel, StoredMel)
            assert after.mel.features == tuple(len(samples) // 320 + 1 for samples in heard)
            short = after.mel()
            assert short.shape[1] < sum(len(samples) / 160 + 4 for samples in heard)
            np.testing.assert_array_equal(short[:, :30], windows(after)[0][:, :30])

    def test_codes_are_those_of_the_codec(self, data: Path, prepared: PreparedSamples, tiny_model: Any) -> None:
        for before, after in zip(read_data(data).samples, prepared, strict=True):
            if before.answer_audio is None:
                assert (after.answer_codes is None) == (before.answer_codes is None)
                continue
            assert after.answer_codes is not None and after.answer_codes.dtype == np.int64
            samples = torch.from_numpy(before.answer_audio.read(24000))
            with torch.inference_mode():
                coarse, middle, fine = (ids[0].tolist() for ids in tiny_model.codec.encode(samples[None, None]))
            assert after.answer_codes.tolist() == [
                [coarse[i], middle[2 * i], *fine[4 * i : 4 * i + 2], middle[2 * i + 1], *fine[4 * i + 2 : 4 * i + 4]]
                for i in range(-(-len(samples) // 2048))
            ]
        given = prepared[5].answer_codes
        assert given is not None and given.tolist() == [[1, 2, 3, 4, 5, 6, 7], [0, 255, 0, 255, 0, 255, 0]]

    def test_codes_stay_on_the_disk(self, prepared: PreparedSamples) -> None:
        codes = prepared[0].answer_codes
        assert codes is not None and not codes.flags.owndata and not codes.flags.writeable

    def test_it_is_a_sequence(self, prepared: PreparedSamples) -> None:
        assert len(prepared) == COUNT == len(list(prepared))
        for i, sample in enumerate(prepared):
            assert sample.where == prepared[i].where
            assert [w.tolist() for w in windows(sample)] == [w.tolist() for w in windows(prepared[i])]
        assert prepared[-1].where == prepared[COUNT - 1].where != prepared[0].where
        assert [s.where for s in prepared[1:5:2]] == [prepared[1].where, prepared[3].where]
        with pytest.raises(IndexError):
            prepared[COUNT]

    @pytest.mark.parametrize("samples", [16000 * 30, 16000 * 30 - 150, 16000 * 30 - 250, 16000, 180, 1])
    def test_windows_that_are_nearly_full(self, tiny_model: Any, tmp_path: Path, samples: int) -> None:
        sound = np.full(1, 0.1, np.float32) if samples == 1 else speech(samples / 16000, 16000, 3)
        soundfile.write(tmp_path / "q.wav", sound, 16000, subtype="FLOAT")
        (after,) = one(tiny_model, tmp_path / "out", Sample("t:1", audio=(Clip.of(tmp_path / "q.wav"),), text="x"))
        same_up_to_float16(windows(after)[0], audio.log_mel(sound, FrontEndSpec(), 3000))

    def test_a_checkpoint_of_short_windows(self, tiny_model: Any, tmp_path: Path) -> None:
        model = with_spec(tiny_model, padded_window=False)
        sound = speech(1.995, 16000, 4)  # its window of 2 s is full: the right edge is mirrored
        soundfile.write(tmp_path / "q.wav", sound, 16000, subtype="FLOAT")
        (after,) = one(model, tmp_path / "out", Sample("t:1", audio=(Clip.of(tmp_path / "q.wav"),), text="x"))
        same_up_to_float16(windows(after)[0], audio.log_mel(sound, FrontEndSpec(), 200))

    def test_training_sees_the_same(self, data: Path, prepared: PreparedSamples, tiny_model: Any) -> None:
        """The items of prepared samples are those of the recordings, and so are the lengths known beforehand."""
        spec = replace(tiny_model.spec, history_turns=1)
        reader = Reader(spec, Tokenizer(tiny_model.tokenizer_json, spec.layout), lambda x: encode_codes(tiny_model, x))
        for before, after in list(zip(read_data(data).samples, prepared, strict=True))[:8]:
            for task in before.tasks():
                ours, theirs = reader.item(after, task), reader.item(before, task)
                np.testing.assert_array_equal(ours.frames.ids, theirs.frames.ids)
                np.testing.assert_array_equal(ours.frames.labels, theirs.frames.labels)
                assert reader.length(after, task) == reader.length(before, task)
                for a, b in zip(ours.heard, theirs.heard, strict=True):
                    assert a.features == b.features
                    same_up_to_float16(a.mel, b.mel)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda spec: {"front_end": replace(spec.front_end, n_mels=128)}, "front end: n_mels 80 and 128"),
            (lambda spec: {"padded_window": False}, "front end: padded_window True and False"),
            (lambda spec: {"codec": replace(spec.codec, sample_rate=16000)}, "codec: sample_rate 24000 and 16000"),
        ],
    )
    def test_another_checkpoint(
        self, prepared: PreparedSamples, tiny_model: Any, change: Callable[[OmniSpec], dict[str, Any]], words: str
    ) -> None:
        with pytest.raises(DataError, match=words):
            read_prepared(prepared.directory, replace(tiny_model.spec, **change(tiny_model.spec)))

    def test_other_weights_of_the_codec(self, prepared: PreparedSamples, tiny_model: Any) -> None:
        with pytest.raises(DataError, match="codec: other weights"):
            read_prepared(prepared.directory, tiny_model.spec, "0" * 64)

    def test_folders(self, prepared: PreparedSamples, tiny_model: Any, tmp_path: Path) -> None:
        assert is_prepared(prepared.directory) and not is_prepared(tmp_path)
        with pytest.raises(DataError, match=MANIFEST):
            read_prepared(tmp_path, tiny_model.spec)
        copy = Path(shutil.copytree(prepared.directory, tmp_path / "copy"))
        shard = copy / prepared.manifest.shards[1]
        shard.write_bytes(b"\xff\xff\xff\xff damaged")
        with pytest.raises(DataError, match=shard.name):
            read_prepared(copy, tiny_model.spec)
        shard.unlink()
        with pytest.raises(DataError, match=shard.name):
            read_prepared(copy, tiny_model.spec)

    @pytest.mark.parametrize("name", ["../t.arrow", "/etc/passwd"])
    def test_a_manifest_that_leads_elsewhere(
        self, prepared: PreparedSamples, tiny_model: Any, tmp_path: Path, name: str
    ) -> None:
        text = json.loads((prepared.directory / MANIFEST).read_text())
        (tmp_path / MANIFEST).write_text(json.dumps({**text, "shards": [name]}))
        with pytest.raises(DataError, match="not there"):
            read_prepared(tmp_path, tiny_model.spec)


class TestBadSamples:
    @pytest.fixture
    def samples(self, data: Path, tmp_path: Path) -> list[Sample]:
        """Good ones, and between them a file that is none, one too long, and codes of another codec."""
        samples = read_data(data).samples[6:10]
        soundfile.write(tmp_path / "long.wav", speech(30.01, 16000, 0), 16000)
        (tmp_path / "bad.wav").write_bytes(b"RIFF no sound")
        bad = [
            Sample(f"bad:{i}", audio=(Clip.of(tmp_path / name),), text="x")
            for i, name in enumerate(("bad.wav", "long.wav"))
        ]
        codes = Sample("bad:2", text="x", answer="y", answer_codes=np.full((2, 7), 256))
        return [samples[0], bad[0], samples[1], bad[1], samples[2], codes, samples[3]]

    @pytest.mark.parametrize(
        ("codes", "words"),
        [
            (np.zeros((3, 6), np.int64), r"shape \(3, 6\).*7 ids"),
            (np.zeros((0, 7), np.int64), r"shape \(0, 7\)"),
            (np.zeros(7, np.int64), r"shape \(7,\)"),
            (np.full((2, 7), -1), "from -1 to -1.*0 to 255"),
            (np.full((2, 7), 256), "from 256 to 256.*0 to 255"),
        ],
    )
    def test_codes_of_another_codec(self, tiny_model: Any, tmp_path: Path, codes: I64, words: str) -> None:
        sample = Sample("t:1", text="x", answer="y", answer_codes=codes)
        with pytest.raises(DataError, match=words):
            one(tiny_model, tmp_path / "out", sample, max_bad=0)

    def test_they_are_told_and_the_others_stay(
        self, samples: list[Sample], tiny_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "edgeomni"):
            read = one(tiny_model, tmp_path / "out", *samples, max_bad=3)
        assert [s.where for s in read] == [samples[i].where for i in (0, 2, 4, 6)]
        assert [read[i].where for i in range(4)] == [s.where for s in read]
        assert [bad.where for bad in read.manifest.left_out] == ["bad:0", "bad:1", "bad:2"]
        assert "long.wav: lasts 30.0 s" in read.manifest.left_out[1].what
        assert [bad.what in caplog.text for bad in read.manifest.left_out] == [True] * 3
        alone = one(tiny_model, tmp_path / "alone", *(samples[i] for i in (0, 2, 4, 6)))
        for a, b in zip(read, alone, strict=True):
            np.testing.assert_array_equal(windows(a)[0], windows(b)[0])
            np.testing.assert_array_equal(a.answer_codes, b.answer_codes)  # type: ignore[arg-type]

    def test_too_many_of_them(self, samples: list[Sample], tiny_model: Any, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="more than 2.*bad:0"):
            one(tiny_model, tmp_path / "out", *samples, max_bad=2)
        assert not (tmp_path / "out").exists()
        assert len(one(tiny_model, tmp_path / "out", *samples, max_bad=3)) == 4

    def test_faults_of_the_reader_count(self, data: Path, tiny_model: Any, tmp_path: Path) -> None:
        path = data.with_name("faults.jsonl")
        path.write_text(data.read_text().splitlines()[6] + "\n{\n")
        with pytest.raises(DataError, match="more than 0"):
            prepare(read_data(path), tiny_model, tmp_path / "out", workers=1, max_bad=0)
        manifest = prepare(read_data(path), tiny_model, tmp_path / "out", workers=1, max_bad=1)
        assert [bad.where for bad in manifest.left_out] == [f"{path}:2"]

    def test_none_left(self, samples: list[Sample], tiny_model: Any, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="every sample was left out"):
            one(tiny_model, tmp_path / "out", samples[1])
        with pytest.raises(DataError, match="no samples"):
            one(tiny_model, tmp_path / "none")
