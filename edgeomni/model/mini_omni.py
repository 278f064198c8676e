"""The released Mini-Omni layout: lit_model.pth (LitGPT names), openai-whisper, SNAC -> OmniModel.

Facts from gpt-omni/mini-omni, litgpt/config.py: text specials are the last 64 rows of `text_vocab_size`. How its
tensors map to ours stands in mini_omni_tensors.py.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import CheckpointError
from ..spec import AdapterSpec, BodySpec, EncoderSpec, OmniSpec, TokenLayout
from . import codecs, encoders
from .mini_omni_tensors import LM_HEAD, Tensors, llm_tensors, released_shapes
from .omni import OmniModel, fill, skeleton
from .tensors import (
    differences,
    digest,
    read_json,
    read_text,
    read_torch,
    refuse,
    refuse_deeper,
    refuse_unusable,
    shapes_of,
    state_of,
    translated,
)

WEIGHTS, CONFIG, TOKENIZER = "lit_model.pth", "model_config.yaml", "tokenizer.json"
LICENCES = {
    "encoder": "MIT (openai/whisper)",
    "llm": "MIT (gpt-omni/mini-omni), Apache-2.0 (Qwen/Qwen2-0.5B)",
    "codec": "MIT (hubertsiuzdak/snac)",
}

# Key -> (LitGPT's default, the only value that is supported). LitGPT can build other bodies than Mini-Omni's, and a key
# that the file leaves out has LitGPT's default there.
_REQUIRED = {
    "norm_class_name": ("LayerNorm", "RMSNorm"),
    "mlp_class_name": ("GptNeoxMLP", "LLaMAMLP"),
    "rotary_percentage": (0.25, 1),
    "parallel_residual": (True, False),
    "shared_attention_norm": (False, False),
    "scale_embeddings": (False, False),
    "lm_head_bias": (False, False),
    "rope_condense_ratio": (1, 1),
    "n_expert": (0, 0),
}
_DEEPEST_YAML = 10


@dataclass(frozen=True)
class Files:
    weights: Path
    config: Path
    tokenizer: Path
    whisper: Path
    snac_config: Path
    snac_weights: Path

    def all(self) -> list[Path]:
        return list(vars(self).values())


@dataclass(frozen=True)
class _Weights:
    """What the three weight files hold: the LLM with adapter, the Whisper encoder with its sizes, the codec."""

    released: Tensors
    encoder: EncoderSpec
    n_mels: int
    whisper: Tensors
    snac: Tensors


def is_layout(directory: Path) -> bool:
    return (directory / WEIGHTS).is_file() or (directory / CONFIG).is_file()


def load(directory: Path) -> OmniModel:
    """Reads the layout. Raises CheckpointError naming all files, or all tensors, that are missing or do not fit."""
    files = _locate(directory)
    config = _read_config(files.config)
    codec_config = snac_config(files.snac_config)
    weights = _read_weights(files)
    with translated(f"{files.config}: values that make no model"):
        spec = _spec_of(config, codec_config, weights)
        _refuse_deeper(files, spec, codec_config, weights)
        model = skeleton(spec, codec_config)
        refuse(str(directory), _problems(model, config.get("padded_vocab_size"), weights))
    _refuse_unusable(files, weights, model.spec.tied)
    fill(
        model,
        {
            **llm_tensors(model, weights.released),
            **{f"encoder.{n}": weights.whisper[encoders.openai_name(n)] for n in model.encoder.state_dict()},
            **{f"codec.{n}": t for n, t in weights.snac.items()},
        },
    )
    model.tokenizer_json = read_text(files.tokenizer)
    model.provenance = {
        "weights": "trained",
        "kind": "mini-omni",
        "source": directory.resolve().name,
        "source_hash": digest(files.all()),
    }
    model.licences = dict(LICENCES)
    return model


def _read_weights(files: Files) -> _Weights:
    released = state_of(read_torch(files.weights), files.weights)
    encoder, n_mels, whisper = encoders.from_openai(read_torch(files.whisper), str(files.whisper))
    snac = codecs.modern_names(state_of(read_torch(files.snac_weights), files.snac_weights))
    return _Weights(released, encoder, n_mels, whisper, snac)


def _spec_of(config: dict[str, Any], codec_config: dict[str, Any], weights: _Weights) -> OmniSpec:
    has_tts = bool(config.get("post_adapter")) and any("post_adapter" in name for name in weights.released)
    return OmniSpec(
        front_end=encoders.front_end(weights.encoder, weights.n_mels),
        encoder=weights.encoder,
        adapter=_adapter_spec(config),
        body=_body_spec(config),
        layout=_layout(config, codec_config),
        codec=codecs.spec_of(codec_config),
        context=config["block_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        tts_layers=config.get("post_adapter_layers", 6) if has_tts else 0,
    )


def _refuse_deeper(files: Files, spec: OmniSpec, codec_config: dict[str, Any], weights: _Weights) -> None:
    """Before anything is built: no configuration may announce more layers than its file has tensors."""
    layers = {"n_layer": spec.body.layers, "post_adapter_layers": spec.tts_layers}
    refuse_deeper(str(files.config), layers, len(weights.released))
    refuse_deeper(str(files.whisper), {"n_audio_layer": spec.encoder.layers}, len(weights.whisper))
    refuse_deeper(str(files.snac_config), codecs.depths(codec_config), len(weights.snac))


def _refuse_unusable(files: Files, weights: _Weights, tied: bool) -> None:
    used = {name: tensor for name, tensor in weights.released.items() if not (tied and name == LM_HEAD)}
    refuse_unusable(str(files.weights), used)
    refuse_unusable(str(files.whisper), weights.whisper)
    refuse_unusable(str(files.snac_weights), weights.snac)


def snac_config(path: Path) -> dict[str, Any]:
    """A SNAC directory's config.json as a codec configuration. Raises CheckpointError for anything else."""
    config = read_json(path)
    if "vq_strides" not in config:
        raise CheckpointError(f"{path}: not a SNAC configuration (it has no vq_strides)")
    return {**config, "kind": "snac"}


def _locate(directory: Path) -> Files:
    snac = next((d for d in (directory / "snac", directory) if (d / "pytorch_model.bin").is_file()), directory / "snac")
    files = Files(
        directory / WEIGHTS,
        directory / CONFIG,
        directory / TOKENIZER,
        _whisper_file(directory),
        snac / "config.json",
        snac / "pytorch_model.bin",
    )
    if missing := [p.relative_to(directory).as_posix() for p in files.all() if not p.is_file()]:
        raise CheckpointError(
            f"{directory}: the Mini-Omni layout lacks {', '.join(missing)}; it needs {WEIGHTS}, {CONFIG}, {TOKENIZER} "
            "(gpt-omni/mini-omni), small.pt or one other openai-whisper *.pt, and SNAC's config.json and "
            "pytorch_model.bin (hubertsiuzdak/snac_24khz) in snac/"
        )
    return files


def _whisper_file(directory: Path) -> Path:
    found = sorted(directory.glob("*.pt"))
    small = directory / "small.pt"
    if small in found or not found:
        return small
    if len(found) > 1:
        raise CheckpointError(
            f"{directory}: several *.pt files ({', '.join(p.name for p in found)}); leave one Whisper"
        )
    return found[0]


def _read_config(path: Path) -> dict[str, Any]:
    with translated(f"{path}: not readable as YAML; download it again"):
        text = path.read_text(encoding="utf-8")
        _refuse_elaborate_yaml(text, path)
        config = yaml.safe_load(text)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a model configuration; download it again")
    needed = ("n_layer", "n_embd", "n_head", "intermediate_size", "block_size")
    if missing := [key for key in needed if not isinstance(config.get(key), int)]:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing or no whole number(s)")
    wrong = [
        f"{key} is {reprlib.repr(config.get(key, default))}, not {value!r}"
        for key, (default, value) in _REQUIRED.items()
        if config.get(key, default) != value
    ]
    if wrong:
        raise CheckpointError(f"{path}: not a Mini-Omni body: {'; '.join(wrong)}")
    return config


def _refuse_elaborate_yaml(text: str, path: Path) -> None:
    """Raises CheckpointError for aliases and deep nesting, which no model configuration needs.

    Nested aliases let a few bytes stand for gigabytes, and the parser's time grows with the square of the depth.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST_YAML:
            raise CheckpointError(
                f"{path}: holds YAML aliases (*name), or is nested deeper than {_DEEPEST_YAML} levels; "
                "a model configuration is a flat list of values"
            )


def _body_spec(config: dict[str, Any]) -> BodySpec:
    bias = bool(config.get("bias", True))
    qkv_bias = bias if config.get("add_qkv_bias") is None else bool(config["add_qkv_bias"])
    heads = config["n_head"]
    return BodySpec(
        kind="qwen2" if qkv_bias and not bias else "llama",
        layers=config["n_layer"],
        width=config["n_embd"],
        heads=heads,
        kv_heads=config.get("n_query_groups") or heads,
        ffn=config["intermediate_size"],
        head_dim=config.get("head_size") or config["n_embd"] // heads,
        rope_theta=float(config.get("rope_base", 10000)),
        norm_eps=float(config.get("norm_eps", 1e-5)),
        qkv_bias=qkv_bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def _adapter_spec(config: dict[str, Any]) -> AdapterSpec:
    kind = config.get("asr_adapter", "llamamlp")
    if kind == "mlp":
        return AdapterSpec("linear", bias=True)
    if kind == "llamamlp":
        return AdapterSpec("swiglu", hidden=config["intermediate_size"], bias=bool(config.get("bias", True)))
    raise CheckpointError(f"asr_adapter {reprlib.repr(kind)}; known are mlp and llamamlp")


def _layout(config: dict[str, Any], codec_config: dict[str, Any]) -> TokenLayout:
    codec = codecs.spec_of(codec_config)
    audio_vocab = config.get("audio_vocab_size", 4160)
    layout = TokenLayout(config.get("text_vocab_size", 152000), audio_vocab, codec.codebook_size, codec.streams)
    if (rows := config.get("cat_audio_vocab_size", 29120)) != codec.streams * audio_vocab:
        raise CheckpointError(
            f"cat_audio_vocab_size {reprlib.repr(rows)} is not audio_vocab_size {audio_vocab} times the codec's "
            f"{codec.streams} streams; use the codec that the model was trained with"
        )
    return layout


def _problems(model: OmniModel, padded_vocab: int | None, weights: _Weights) -> list[str]:
    expected_whisper = {encoders.openai_name(n): tuple(t.shape) for n, t in model.encoder.state_dict().items()}
    optional = (LM_HEAD,) if model.spec.tied else ()
    return [
        *differences(released_shapes(model, padded_vocab), shapes_of(weights.released), optional=optional),
        *differences(expected_whisper, shapes_of(weights.whisper)),
        *differences(shapes_of(model.codec.state_dict()), shapes_of(weights.snac)),
    ]
