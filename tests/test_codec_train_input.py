"""What a codec run is told: configurations, data, the command line, and what is refused before it begins."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from codec_train_parts import CONFIG, RATE, changed, harmonic, logged, sounds

from edgeomni.cli import main
from edgeomni.data.sample import Clip, Sample
from edgeomni.errors import DataError, TrainError, UsageError
from edgeomni.schema import Source, parse_toml
from edgeomni.train.codec_config import CodecSizes, CodecTrainConfig, read_config, to_config, written
from edgeomni.train.codec_data import Waves, clips_in, clips_of, read_waves, split
from edgeomni.train.codec_fit import fit_codec, resumed

TINY = """
[codec]
sampling_rate = 8000
encoder_dim = 6
encoder_rates = [4, 4]
decoder_dim = 24
decoder_rates = [4, 4]
codebook_size = 16
codebook_dim = 4
vq_strides = [2, 1]
[data]
train = ["data"]
segment = 1024
[loss]
windows = [64, 256]
mel_bands = [8, 24]
[quantizer]
start = 2
kmeans_segments = 8
[run]
log_every = 2
"""


def test_a_configuration_survives_being_written(tmp_path: Path) -> None:
    config = changed(adversarial={"from_step": 7}, seed=3, run={"precision": "bf16"}, data={"train": ["/a b/ü.jsonl"]})
    (tmp_path / "config.toml").write_text(written(config), encoding="utf-8")
    assert to_config(read_config(tmp_path / "config.toml"), "x") == config


def test_paths_are_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "codec").mkdir()
    (tmp_path / "c.toml").write_text('start = "codec"\n[data]\ntrain = ["a.jsonl", "/b"]')
    config = to_config(read_config(tmp_path / "c.toml"), "x")
    assert config.start == str(tmp_path / "codec") and config.data.train == [str(tmp_path / "a.jsonl"), "/b"]
    (tmp_path / "c.toml").write_text('start = "someone/a-hub-id"')
    assert to_config(read_config(tmp_path / "c.toml"), "x").start == "someone/a-hub-id"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[codec]\nwidth = 3", r"c\.toml: unknown key\(s\) \$\.codec\.width; correct it"),
        ("[optimizer]\nlr = -1", r"c\.toml: \$\.optimizer\.lr: .*> 0"),
        (
            "[codec]\nencoder_rates = [4, 4]",
            r"\$\.codec: encoder_rates \[4, 4\] and decoder_rates .* different products",
        ),
        ("[codec]\nvq_strides = [4, 3, 1]", r"\$\.codec: vq_strides \[4, 3, 1\] must divide the first"),
        ("[codec]\ndecoder_dim = 100", "decoder_dim 100 cannot be halved"),
        ("[loss]\nmel_bands = [3]", r"\$\.loss: 4 windows and 1 mel_bands"),
        ("[loss]\nwindows = [64]\nmel_bands = [40]", "mel_bands at most half"),
    ],
)
def test_bad_keys_are_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(TrainError, match=said):
        to_config(read_config(tmp_path / "c.toml"), "c.toml")


def test_contradictions_between_sections() -> None:
    for config, said in (
        (changed(data={"segment": 1030}), "data.segment is 1030; this codec needs a multiple of 32 samples"),
        (changed(data={"segment": 512}), "shorter than a window of 1024"),
        (changed(loss={"windows": (64, 4096)}), "shorter than a window of 4096"),
        (changed(adversarial={"from_step": 1}), "shorter than a window of 2048"),
        (changed(decoder_only=True), "decoder_only needs a trained codec"),
        (changed(optimizer={"steps": 25}), "steps 25 end before quantizer.start 25"),
    ):
        with pytest.raises(TrainError, match=said):
            config.check()
    CONFIG.check()
    CodecTrainConfig().check()


def test_sizes_are_snacs() -> None:
    assert CodecSizes().unit == 512 * 4 and CodecSizes(attn_window_size=32).unit == 512 * 32
    assert CodecSizes().arguments()["latent_dim"] == 256 and CodecSizes().arguments()["attn_window_size"] is None


def test_recordings_of_questions_and_answers() -> None:
    question, answer = Clip.of("q.wav"), Clip.of("a.wav")
    samples = [Sample("x:1", audio=(question, question)), Sample("x:2", audio=(question,), answer_audio=answer)]
    assert clips_in(samples, "all") == [question, question, question, answer]
    assert clips_in(samples, "answers") == [answer]


def test_folders_and_data_sets(tmp_path: Path) -> None:
    folder = sounds(tmp_path / "data", 2, 0.3)
    (folder / "deeper").mkdir()
    soundfile.write(folder / "deeper" / "x.FLAC", harmonic(0.3, 5), RATE, format="FLAC")
    (folder / "notes.txt").write_text("no sound")
    named = [Path(clip.name).name for clip in clips_of(changed(data={"train": [str(folder)]}).data)]
    assert named == ["0.wav", "1.wav", "x.FLAC"]
    lines = '{"audio": "data/0.wav", "text": "a"}\n{"text": "q", "answer": "b", "answer_audio": "data/1.wav"}\n'
    (tmp_path / "set.jsonl").write_text(lines)
    both = changed(data={"train": [str(tmp_path / "set.jsonl"), str(folder)]})
    assert len(clips_of(both.data)) == 2 + 3
    assert len(clips_of(changed(both, data={"use": "answers", "train": both.data.train[:1]}).data)) == 1
    (tmp_path / "texts.jsonl").write_text('{"text": "q", "answer": "b"}\n')
    with pytest.raises(DataError, match=r"texts\.jsonl: no sample has audio or answer_audio"):
        clips_of(changed(data={"train": [str(tmp_path / "texts.jsonl")]}).data)


def test_recordings_that_cannot_be_read_are_told_up_to_a_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = sounds(tmp_path / "data", 3, 0.3)
    (folder / "1.wav").write_bytes(b"RIFF nonsense")
    soundfile.write(folder / "2.wav", np.zeros(2000), RATE)
    clips = [Clip.of(folder / f"{i}.wav") for i in range(3)]
    with caplog.at_level(logging.WARNING, "edgeomni"):
        waves = read_waves(clips, 16000, 2, tmp_path)
    assert len(caplog.records) == 2 and "1.wav" in caplog.text and "2.wav: is silent" in caplog.text
    assert waves.seconds == pytest.approx(0.3) and waves.rate == 16000
    with pytest.raises(DataError, match=r"2 recordings cannot be used, the last: .*2\.wav"):
        read_waves(clips, RATE, 1, tmp_path)
    with pytest.raises(DataError, match="none of 2 recordings"):
        read_waves(clips[1:], RATE, 9, tmp_path)


def test_segments_are_parts_of_one_recording_with_silence_around() -> None:
    samples = np.concatenate([np.arange(1, 101), np.arange(1001, 1031)]).astype(np.int16)
    waves = Waves(samples, np.array([0, 100, 130]), RATE)

    def cut(i: int, start: int, length: int) -> list[int]:
        return [round(x * 32767) for x in waves.cut(i, start, length).tolist()]

    assert cut(0, -2, 4) == [0, 0, 1, 2] and cut(0, 98, 4) == [99, 100, 0, 0]
    assert cut(1, 0, 3) == [1001, 1002, 1003] and cut(1, 29, 3) == [1030, 0, 0] and cut(1, 50, 2) == [0, 0]
    torch.manual_seed(0)
    drawn = (waves.draw(np.array([0, 1]), 300, 8) * 32767).round()
    assert drawn.shape == (300, 8)
    assert ((drawn > 1000).any(dim=1) & ((drawn > 0) & (drawn < 200)).any(dim=1)).sum() == 0
    assert 0.1 < (drawn > 1000).any(dim=1).float().mean() < 0.4
    assert drawn.max() == 1030 and (drawn == 1).any() and (drawn[:, 0] == 0).any() and (drawn[:, -1] == 0).any()
    on_grid = (waves.draw(np.array([0]), 50, 8, grid=4) * 32767).round()
    assert {int(row[0]) % 4 for row in on_grid if row[0]} == {1}
    assert waves.pieces(np.array([0, 1]), 40, 9).shape == (3, 40) and len(waves.pieces(np.array([0, 1]), 40, 2)) == 2


def test_a_tenth_at_most_is_held_out() -> None:
    waves = Waves(np.zeros(20 * RATE, np.int16), np.arange(21) * RATE, RATE)
    learnt, held = split(waves, 60, 0)
    assert len(held) == 2 and sorted([*learnt, *held]) == list(range(20))
    assert len(split(waves, 1.5, 0)[1]) == 1 and len(split(waves, 0, 0)[1]) == 0
    assert split(waves, 60, 1)[1].tolist() != held.tolist()


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with tiny.toml and its data."""
    monkeypatch.chdir(tmp_path)
    sounds(tmp_path / "data", 3, 0.5)
    Path("tiny.toml").write_text(TINY)
    return tmp_path


def test_the_command(told: Path) -> None:
    command = ["train-codec", "tiny.toml", "--steps", "4", "--seed", "5", "--set", "optimizer.batch=2", "-o", "run"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "step 4 of 4: loss" in done.stderr and "codes used" in done.stderr and "run/codec: written" in done.stderr
    stored = to_config(read_config(told / "run" / "config.toml"), "x")
    assert (stored.seed, stored.optimizer.steps, stored.optimizer.batch) == (5, 4, 2)
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 2 and "run exists; go on with it by --resume" in again.stderr
    longer = CliRunner().invoke(main, ["train-codec", "--resume", "--steps", "6", "-o", "run"])
    assert longer.exit_code == 0, longer.output
    assert [record["step"] for record in logged(told / "run")] == [2, 4, 6]
    tuned = [
        "train-codec",
        "run/codec",
        "--data",
        "data",
        "--decoder-only",
        "--set",
        "data.segment=2048",
        "-o",
        "tuned",
    ]
    done = CliRunner().invoke(main, [*tuned, "--steps", "1"])
    assert done.exit_code == 0, done.output
    tuned_codec = to_config(read_config(told / "tuned" / "config.toml"), "x").codec
    assert tuned_codec.arguments() == stored.codec.arguments()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no data: give --data DATA"),
        (["a", "--init", "b", "--data", "data"], "SOURCE a and --init b both name a codec"),
        (["--data", "data", "--resume"], "no run to resume"),
        (["--data", "data", "--set", "nonsense"], "--set 'nonsense' is not of the form"),
    ],
)
def test_what_the_command_refuses(options: list[str], said: str, told: Path) -> None:
    done = CliRunner().invoke(main, ["train-codec", *options, "-o", "run"])
    assert done.exit_code == 2 and said in done.stderr, done.output
    assert not Path("run").exists()


def test_what_a_resumed_run_may_change(told: Path) -> None:
    run = told / "run"
    run.mkdir()
    (run / "config.toml").write_text(written(CONFIG))
    assert resumed(run, None, ["optimizer.lr=1e-4", "run.log_every=7"]).optimizer.lr == 1e-4
    for change in ("seed=4", "codec.codebook_size=32", "decoder_only=true", "adversarial.channels=3"):
        with pytest.raises(UsageError, match=f"cannot have another {change.split('=')[0]}"):
            resumed(run, None, [change])
    with pytest.raises(UsageError, match="another .*data.train"):
        resumed(run, str(told / "tiny.toml"), [])


def test_cuda_that_is_not_there(told: Path) -> None:
    clips = [Clip.of(told / "data" / "0.wav")]
    with pytest.raises(TrainError, match="run.device is cuda, and torch sees no CUDA"):
        fit_codec(changed(run={"device": "cuda"}), clips, told / "run")


def test_the_documented_defaults_are_the_defaults() -> None:
    text = (Path(__file__).parents[1] / "docs" / "train-codec.md").read_text(encoding="utf-8")
    toml = text.split("```toml\n")[1].split("```")[0]
    documented = parse_toml(toml.encode(), Source("docs", TrainError, "correct it"))
    stored = parse_toml(written(CodecTrainConfig()).encode(), Source("x", TrainError, "correct it"))
    assert documented == stored
