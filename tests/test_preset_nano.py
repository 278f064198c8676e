"""The preset "nano": its sizes, its front end, a vocabulary of given words, and checkpoints in half precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from tokenizers import Tokenizer as HubTokenizer

from edgeomni import audio
from edgeomni.cli import init as init_command
from edgeomni.cli import main
from edgeomni.errors import CheckpointError
from edgeomni.model import checkpoints, presets
from edgeomni.model.preset_words import made_up, split_words, vocabulary_of
from edgeomni.model.tensors import shapes_of
from edgeomni.train.config import TrainConfig
from edgeomni.train.provenance import licences_of

TEXTS = ["What is TWO plus two?", "don't say a_b", "cuánto es e\u0301l ΟΔΟΣ İstanbul", "हिन्दी भाषा", "<unk> 12"]
"""Signs, capitals, composed and combining accents, Greek's last sigma, vowel signs that are no letters."""


@pytest.fixture(scope="module")
def nano() -> Any:
    return checkpoints.preset("nano", 0)


def edgeomni(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def data_of(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_nano_has_8_to_10_million_parameters_and_the_architecture_of_mini_omni(nano: Any) -> None:
    assert 8e6 < sum(tensor.numel() for tensor in nano.state_dict().values()) < 10e6
    spec, large = nano.spec, presets.spec_of("mini-omni")
    assert (spec.body.kind, spec.adapter.kind, spec.tasks) == (large.body.kind, large.adapter.kind, large.tasks)
    assert (spec.codec.kind, spec.codec.vq_strides) == (large.codec.kind, large.codec.vq_strides)
    assert nano.spec == presets.spec_of("nano")


def test_one_feature_of_nano_is_40_ms_and_one_codec_frame_128_ms(nano: Any) -> None:
    spec = nano.spec
    assert (spec.front_end.sample_rate, spec.front_end.hop, spec.front_end.n_fft) == (16000, 320, 512)
    assert spec.encoder.context * 2 * spec.front_end.hop == spec.front_end.window_s * spec.front_end.sample_rate
    assert 2 * spec.front_end.hop / spec.front_end.sample_rate == 0.040
    assert not spec.padded_window
    codes = [torch.zeros(1, 3 * n, dtype=torch.long) for n in spec.codec.ids_per_level]
    assert nano.decode_codes(codes).shape[-1] == 3 * 0.128 * 16000


def slaney_bands(n_fft: int, n_mels: int, rate: int) -> np.ndarray:
    """Triangles of equal area on Slaney's scale: 3 bands to 200 Hz up to 1 kHz, then 27 to a factor of 6.4."""
    top = 15 + 27 * np.log(rate / 2 / 1000) / np.log(6.4)
    mels = np.linspace(0, top, n_mels + 2)
    corners = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    bands = np.zeros((n_mels, n_fft // 2 + 1))
    for band, (low, middle, high) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        for line in range(n_fft // 2 + 1):
            hertz = line * rate / n_fft
            slope = min((hertz - low) / (middle - low), (high - hertz) / (high - middle))
            bands[band, line] = max(0.0, slope) * 2 / (high - low)
    return bands


def test_the_front_end_is_whispers_with_nanos_hop_and_transform(nano: Any) -> None:
    """Against torch.stft in float64 and bands computed here: reflected edges, a periodic Hann window, 8 at most."""
    front = nano.spec.front_end
    rng = np.random.default_rng(0)
    samples = (0.1 * rng.standard_normal(9000) * np.linspace(0, 1, 9000)).astype(np.float32)
    frames = 2 * nano.spec.encoder.context
    whole = torch.zeros(frames * 320, dtype=torch.float64)
    whole[: len(samples)] = torch.from_numpy(samples)
    window = torch.hann_window(512, periodic=True, dtype=torch.float64)
    power = torch.stft(whole, 512, 320, window=window, center=True, pad_mode="reflect", return_complex=True).abs() ** 2
    mel = np.log10(np.maximum(slaney_bands(512, 80, 16000) @ power[:, :-1].numpy(), 1e-10))
    expected = (np.maximum(mel, mel.max() - 8) + 4) / 4
    found = audio.log_mel(samples, front, frames)
    assert found.shape == (80, 400)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_what_init_offers_is_what_there_is() -> None:
    assert set(init_command.PRESETS) == set(presets.PRESETS)


# --- words


def test_a_vocabulary_has_each_word_once_in_order_and_fills_its_rows() -> None:
    vocabulary = vocabulary_of(["Two", "plus", "two", "plus three"])
    assert vocabulary[:4] == ["<unk>", "two", "plus", "three"]
    assert vocabulary[4:] == [f"<unused{i}>" for i in range(60)]
    assert len(vocabulary_of([f"w{i}" for i in range(63)])) == 64
    assert len(vocabulary_of([f"w{i}" for i in range(64)])) == 128


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_knows_every_word_of_the_texts_that_its_vocabulary_is_of(text: str) -> None:
    """Words are split as the tokenizer itself does it, in every script."""
    model: Any = checkpoints.preset("tiny", 0, vocabulary_of(TEXTS))
    found = HubTokenizer.from_str(model.tokenizer_json).encode(text)
    assert 0 not in found.ids and len(found.ids) >= len(text.split())
    assert [HubTokenizer.from_str(model.tokenizer_json).id_to_token(i) for i in found.ids] == split_words(text)


def test_a_word_that_is_not_in_the_vocabulary_is_unknown_and_its_neighbours_are_not() -> None:
    model: Any = checkpoints.preset("nano", 0, ["what", "is", "two"])
    assert HubTokenizer.from_str(model.tokenizer_json).encode("What is seven").ids == [1, 2, 0]
    assert model.spec.layout.text_vocab - model.spec.layout.text_specials == 64
    assert model.text_rows().shape[0] == model.spec.layout.text_vocab
    assert model.tokenizer_json is not None and "<unused59>" in model.tokenizer_json


def test_without_words_the_vocabulary_is_made_up(nano: Any) -> None:
    words = json.loads(nano.tokenizer_json)["model"]["vocab"]
    assert list(words) == made_up(448) and len(set(words)) == 448 and list(words)[0] == "<unk>"


def test_models_of_other_words_are_not_taken_for_one_another() -> None:
    hashes = {
        checkpoints.preset("tiny", 0, words).provenance["source_hash"]
        for words in ([], ["one"], ["two"], ["two", "one"], ["one", "two"])
    }
    assert len(hashes) == 5
    assert checkpoints.preset("tiny", 0, ["One"]).provenance["source_hash"] in hashes


def test_init_takes_the_words_of_everything_in_the_samples(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = data_of(
        tmp_path / "a",
        [
            {"text": "zebra?", "answer": "Apple", "system": "be brief"},
            {"text": "and now", "answer": "pear", "history": [["who", "me"]]},
        ],
    )
    second = data_of(tmp_path / "b", [{"audio": "q.wav", "text": "cuánto"}])
    given = ("--words", first, "--words", second)
    done = edgeomni("init", "--preset", "tiny", "--random", *given, "-o", tmp_path / "ckpt")
    assert done.exit_code == 0, done.output
    words = list(json.loads((tmp_path / "ckpt" / "tokenizer.json").read_text())["model"]["vocab"])
    said = ["?", "and", "apple", "be", "brief", "cuánto", "me", "now", "pear", "who", "zebra"]
    assert words[: len(said) + 2] == ["<unk>", *said, "<unused0>"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--preset", "tiny", "--random", "--words", "silent.jsonl"], 1, "silent.jsonl: no sample in it can be used"),
        (["--preset", "tiny", "--random", "--words", "none.jsonl"], 1, "none.jsonl: no such file"),
        (["--preset", "tiny", "--random", "--recipe", "--words", "silent.jsonl"], 2, "without --recipe"),
        (["--from", "ckpt", "--words", "silent.jsonl"], 2, "--words is the vocabulary of new random weights"),
        (["--preset", "tiny", "--random", "--recipe", "--half"], 2, "--recipe writes no weights that --half"),
        (["--preset", "tiny", "--random", "--recipe", "--licence", "MIT"], 2, "leave --licence out"),
        (["--half"], 2, "give --encoder, --llm and --codec, or --preset mini-omni|nano|tiny --random"),
        (["--preset", "nano"], 2, "say --random"),
        (["--from", "ckpt", "--half", "--streams", "2"], 2, "nothing to swap"),
    ],
)
def test_mistakes(words: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints.save_preset("tiny", 0, tmp_path / "ckpt")
    Path("silent.jsonl").write_text('{"audio": "q.wav", "answer_audio": "a.wav"}\n')
    done = edgeomni("init", *words, "-o", "new")
    assert (done.exit_code, message in done.output) == (code, True), done.output
    assert not Path("new").exists() and isinstance(done.exception, SystemExit)


def test_a_new_encoder_hears_its_sound_above_its_positions(nano: Any) -> None:
    """Where the sinusoids are louder, CTC training from nothing takes twice as long to hear the first words."""
    spec = nano.spec.front_end
    rng = np.random.default_rng(0)
    sound = np.repeat(rng.uniform(0.01, 0.5, 40), 1600) * rng.standard_normal(64000)  # four seconds that rise and fall
    mel = torch.from_numpy(audio.log_mel(sound.astype(np.float32), spec, 200))[None]
    encoder = nano.encoder
    with torch.no_grad():
        heard = torch.nn.functional.gelu(encoder.conv2(torch.nn.functional.gelu(encoder.conv1(mel))))
    positions = encoder.embed_positions.weight[:100]
    assert float(positions.square().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(heard.square().mean()) > 2 * 0.5


# --- half precision


def test_half_stores_every_weight_as_float16_and_loads_exactly_that(nano: Any, tmp_path: Path) -> None:
    checkpoints.save(nano, tmp_path / "whole")
    checkpoints.save(nano, tmp_path / "half", half=True)
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert whole.keys() == half.keys()
    for name, tensor in whole.items():
        assert half[name].dtype == (torch.float16 if tensor.is_floating_point() else tensor.dtype), name
    assert any(tensor.is_floating_point() for tensor in half.values())
    loaded = checkpoints.load(tmp_path / "half")
    assert (loaded.spec, loaded.licences) == (nano.spec, nano.licences)
    assert loaded.provenance["source"] == "nano, seed 0"
    assert loaded.tokenizer_json == nano.tokenizer_json
    for name, tensor in loaded.state_dict().items():
        original = nano.state_dict()[name]
        expected = original.half().float() if original.is_floating_point() else original
        assert tensor.dtype == original.dtype and torch.equal(tensor, expected), name


def test_a_checkpoint_of_nano_in_half_precision_has_less_than_20_mb(nano: Any, tmp_path: Path) -> None:
    checkpoints.save(nano, tmp_path / "half", half=True)
    size = sum(path.stat().st_size for path in (tmp_path / "half").iterdir())
    assert 2 * sum(torch.Size(shape).numel() for shape in shapes_of(nano.state_dict()).values()) < size < 20e6


@pytest.mark.parametrize(("value", "kept"), [(65504.0, True), (-65519.0, True), (65520.0, False), (-1e30, False)])
def test_weights_beyond_float16_are_refused_and_named(value: float, kept: bool, tmp_path: Path) -> None:
    """65504 is the largest float16; what rounds to it is kept, from 65520 on it would be infinite."""
    model = checkpoints.preset("tiny", 0)
    with torch.no_grad():
        model.state_dict()["adapter.proj.weight"][3, 4] = value
    if kept:
        checkpoints.save(model, tmp_path / "half", half=True)
        found = checkpoints.load(tmp_path / "half").state_dict()["adapter.proj.weight"][3, 4]
        assert float(found) == np.sign(value) * 65504
    else:
        with pytest.raises(CheckpointError, match=r"adapter\.proj\.weight holds weights beyond float16's 65504"):
            checkpoints.save(model, tmp_path / "half", half=True)
        assert not (tmp_path / "half").exists()


def test_init_copies_a_checkpoint_in_half_precision(tmp_path: Path) -> None:
    checkpoints.save(checkpoints.preset("tiny", 3), tmp_path / "ckpt")
    done = edgeomni("init", "--from", tmp_path / "ckpt", "--half", "-o", tmp_path / "half")
    assert done.exit_code == 0 and done.stderr == f"{tmp_path / 'half'}: written\n", done.output
    before, after = checkpoints.load(tmp_path / "ckpt"), checkpoints.load(tmp_path / "half")
    assert all(torch.equal(t, before.state_dict()[n].half().float()) for n, t in after.state_dict().items())
    files = [tmp_path / name / "model.safetensors" for name in ("ckpt", "half")]
    assert files[1].stat().st_size < 0.55 * files[0].stat().st_size
    assert edgeomni("init", "--from", tmp_path / "ckpt", "-o", tmp_path / "copy").exit_code == 2


def test_init_states_a_licence_and_copies_the_weights_as_they_are(tmp_path: Path) -> None:
    checkpoints.save(checkpoints.preset("tiny", 3), tmp_path / "ckpt")
    done = edgeomni("init", "--from", tmp_path / "ckpt", "--licence", "Apache-2.0", "-o", tmp_path / "copy")
    assert done.exit_code == 0, done.output
    before, after = checkpoints.load(tmp_path / "ckpt"), checkpoints.load(tmp_path / "copy")
    assert after.licences == {"encoder": "Apache-2.0", "llm": "Apache-2.0", "codec": "Apache-2.0"}
    assert after.provenance["source"] == before.provenance["source"] == "tiny, seed 3"
    assert all(torch.equal(t, before.state_dict()[n]) for n, t in after.state_dict().items())


def test_what_was_random_and_is_taught_is_licensed_by_who_trained_it() -> None:
    random, mine = "random weights, no licence needed", "MIT (mine)"
    before = {"encoder": random, "llm": random, "codec": random}
    ours = "trained from random weights; whoever trained it chooses the licence"
    ear, mouth = TrainConfig(stage="ctc"), TrainConfig(stage="end-to-end", lora=False)
    assert licences_of(before, ear) == {"encoder": ours, "llm": random, "codec": random}
    assert licences_of(before, mouth) == {"encoder": random, "llm": ours, "codec": random}
    assert licences_of({"encoder": mine, "llm": mine, "codec": mine}, mouth) == dict.fromkeys(before, mine)
    assert licences_of({}, mouth) == {}


def test_init_makes_a_new_model_in_half_precision(tmp_path: Path) -> None:
    for name, option in (("whole", []), ("half", ["--half"])):
        done = edgeomni("init", "--preset", "tiny", "--random", "--seed", 5, *option, "-o", tmp_path / name)
        assert done.exit_code == 0, done.output
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(half[n], t.half()) for n, t in whole.items() if t.is_floating_point())
