"""A model small enough to be trained in a test, and spoken-looking samples for it, made of tones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from edgeomni.data.sample import Clip, Sample
from edgeomni.spec import AdapterSpec, BodySpec, EncoderSpec, OmniSpec, TokenLayout

SAID = "zero one two three four five six seven eight nine plus is and the what hello good yes no you"
WORDS = SAID.split()
WORDS_IN_TABLE = 40
SPECIALS = 8
SNAC = {
    "kind": "snac",
    "sampling_rate": 16000,
    "encoder_dim": 4,
    "encoder_rates": [4, 4, 4, 8],
    "decoder_dim": 32,
    "decoder_rates": [8, 4, 4, 4],
    "attn_window_size": None,
    "codebook_size": 32,
    "codebook_dim": 4,
    "vq_strides": [4, 2, 1],
    "noise": False,
    "depthwise": True,
}


def small_spec(**changes: Any) -> OmniSpec:
    from edgeomni.model import codecs, encoders

    encoder = EncoderSpec(layers=1, width=32, heads=2, ffn=64, context=100)
    codec = codecs.spec_of(SNAC)
    parts: dict[str, Any] = {
        "front_end": encoders.front_end(encoder, 40),
        "encoder": encoder,
        "adapter": AdapterSpec("swiglu", hidden=64),
        "body": BodySpec("qwen2", 2, 64, 4, 2, head_dim=16, ffn=96, rope_theta=1e4, qkv_bias=True),
        "layout": TokenLayout(
            WORDS_IN_TABLE + SPECIALS, codec.codebook_size + 8, codec.codebook_size, codec.streams, SPECIALS
        ),
        "codec": codec,
        "context": 256,
        "padded_window": False,
    }
    return OmniSpec(**{**parts, **changes})


def small_model(seed: int = 0, **changes: Any) -> Any:
    """OmniModel of `small_spec` with random weights, which know nothing."""
    from edgeomni.model.omni import fill, skeleton
    from edgeomni.model.presets import draw
    from edgeomni.model.tensors import shapes_of

    model = skeleton(small_spec(**changes), SNAC)
    fill(model, {name: draw(name, shape, seed) for name, shape in shapes_of(model.state_dict()).items()})
    model.tokenizer_json = tokenizer_json()
    model.provenance = {"weights": "random", "kind": "preset", "source_hash": f"small:{seed}"}
    model.licences = dict.fromkeys(("encoder", "llm", "codec"), "random weights")
    return model


def tokenizer_json() -> str:
    """One id per word of WORDS, in their order; other words are <unk>."""
    vocab = {word: i for i, word in enumerate(["<unk>", *WORDS])}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    split = {"type": "Whitespace"}
    return json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model})


def ids_of(text: str) -> list[int]:
    return [1 + WORDS.index(word) for word in text.split()]


def tone(hertz: float, seconds: float, rate: int = 16000) -> np.ndarray:
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * hertz * t) + 0.1 * np.sin(6.3 * np.pi * hertz * t)).astype(np.float32)


def samples_in(folder: Path, count: int = 4, **fields: Any) -> list[Sample]:
    """Samples that serve every task: question i is a tone of its own that "says" two words."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for i in range(count):
        question, answer = folder / f"q{i}.wav", folder / f"a{i}.wav"
        soundfile.write(question, tone(200 + 90 * i, 0.3 + 0.05 * (i % 5)), 16000)
        soundfile.write(answer, tone(150 + 60 * i, 0.6 + 0.15 * (i % 3)), 16000)
        given = {
            "audio": (Clip.of(question),),
            "text": f"{WORDS[i % 10]} plus",
            "answer": f"{WORDS[(i + 3) % 10]} is",
            "answer_audio": Clip.of(answer),
        }
        made.append(Sample(where=f"made:{i}", **{**given, **fields}))
    return made


def data_in(folder: Path, count: int = 4) -> Path:
    """The same samples as a native JSON Lines file."""
    samples_in(folder, count)
    lines = [
        {
            "audio": f"q{i}.wav",
            "text": f"{WORDS[i % 10]} plus",
            "answer": f"{WORDS[(i + 3) % 10]} is",
            "answer_audio": f"a{i}.wav",
        }
        for i in range(count)
    ]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def small_config(**sections: Any) -> Any:
    """A TrainConfig of 8 logged steps with states after every second one; `sections` may hold plain tables."""
    from edgeomni.train.config_file import from_changes

    tables: dict[str, Any] = {
        "peft": {"rank": 4, "dropout": 0.1},
        "optimizer": {"steps": 8, "batch": 3, "lr": 2e-3, "schedule": "constant", "warmup": 0.0},
        "run": {"log_every": 1, "save_every": 2, "keep": 99},
    }
    for name, given in sections.items():
        tables[name] = {**tables[name], **given} if name in tables else given
    return from_changes(tables)


def figures_in(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log without the seconds, which no two runs share."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights_in(checkpoint: Path) -> dict[str, bytes]:
    """Name -> bytes of every tensor of a checkpoint directory."""
    from safetensors.numpy import load_file

    return {name: array.tobytes() for name, array in load_file(checkpoint / "model.safetensors").items()}
