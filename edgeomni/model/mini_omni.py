"""The released Mini-Omni layout: lit_model.pth (LitGPT names), openai-whisper, SNAC -> OmniModel.

Facts from gpt-omni/mini-omni, litgpt/config.py and litgpt/model.py: QKV fused and interleaved per KV group
([q * heads/groups, k, v] per group); text specials are the last 64 rows of `text_vocab_size`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ..errors import CheckpointError
from ..spec import AdapterSpec, BodySpec, OmniSpec, TokenLayout
from . import codecs, encoders
from .omni import OmniModel, fill, skeleton
from .tensors import differences, digest, read_torch, refuse, shapes_of, state_of

Tensors = dict[str, Tensor]

WEIGHTS, CONFIG, TOKENIZER = "lit_model.pth", "model_config.yaml", "tokenizer.json"
LICENCES = {
    "encoder": "MIT (openai/whisper)",
    "llm": "MIT (gpt-omni/mini-omni), Apache-2.0 (Qwen/Qwen2-0.5B)",
    "codec": "MIT (hubertsiuzdak/snac)",
}

# What LitGPT can do and Mini-Omni's forward does not need; its own defaults differ, so absent keys are LitGPT's.
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
_BODY_NAMES = (
    (r"input_layernorm\.", "norm_1."),
    (r"post_attention_layernorm\.", "norm_2."),
    (r"self_attn\.o_proj\.", "attn.proj."),
    (r"self_attn\.[qkv]_proj\.", "attn.attn."),
    (r"mlp\.gate_proj\.", "mlp.fc_1."),
    (r"mlp\.up_proj\.", "mlp.fc_2."),
    (r"mlp\.down_proj\.", "mlp.proj."),
    (r"^body\.layers\.", "transformer.h."),
    (r"^tts\.layers\.", "transformer.post_adapter."),
    (r"^body\.norm\.", "transformer.ln_f."),
    (r"^tts\.norm\.", "transformer.post_adapter_audio_ln."),
    (r"^adapter\.", "whisper_adapter."),
    (r"^embedding\.", "transformer.wte."),
)
_LM_HEAD = "lm_head.weight"
_TTS_HEAD = "transformer.post_adapter_audio_lm_head.weight"


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


def is_layout(directory: Path) -> bool:
    return (directory / WEIGHTS).is_file() or (directory / CONFIG).is_file()


def load(directory: Path) -> OmniModel:
    """Reads the layout. Raises CheckpointError naming all files, or all tensors, that are missing or do not fit."""
    files = _locate(directory)
    config = _read_config(files.config)
    released = state_of(read_torch(files.weights), files.weights)
    encoder, n_mels, whisper = encoders.from_openai(read_torch(files.whisper), str(files.whisper))
    codec_config = snac_config(files.snac_config)
    snac = codecs.modern_names(state_of(read_torch(files.snac_weights), files.snac_weights))
    has_tts = bool(config.get("post_adapter")) and any("post_adapter" in name for name in released)
    spec = OmniSpec(
        front_end=encoders.front_end(encoder, n_mels),
        encoder=encoder,
        adapter=_adapter_spec(config),
        body=_body_spec(config),
        layout=_layout(config, codec_config),
        codec=codecs.spec_of(codec_config),
        context=config["block_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        tts_layers=config.get("post_adapter_layers", 6) if has_tts else 0,
    )
    model = skeleton(spec, codec_config)
    refuse(str(directory), _problems(model, config.get("padded_vocab_size"), released, whisper, snac))
    fill(
        model,
        {
            **_llm_tensors(model, released),
            **{f"encoder.{n}": whisper[encoders.openai_name(n)] for n in model.encoder.state_dict()},
            **{f"codec.{n}": t for n, t in snac.items()},
        },
    )
    model.tokenizer_json = files.tokenizer.read_text(encoding="utf-8")
    model.provenance = {
        "weights": "trained",
        "kind": "mini-omni",
        "source": directory.resolve().name,
        "source_hash": digest(files.all()),
    }
    model.licences = dict(LICENCES)
    return model


def snac_config(path: Path) -> dict[str, Any]:
    """A SNAC directory's config.json as a codec configuration."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path}: no readable codec configuration ({exc}); download it again") from exc
    if not isinstance(config, dict) or "vq_strides" not in config:
        raise CheckpointError(f"{path}: not a SNAC configuration (it has no vq_strides)")
    return {"kind": "snac", **config}


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
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise CheckpointError(f"{path}: not readable as YAML ({exc}); download it again") from exc
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a model configuration; download it again")
    needed = ("n_layer", "n_embd", "n_head", "intermediate_size", "block_size")
    if missing := [key for key in needed if not isinstance(config.get(key), int)]:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing or no whole number(s)")
    wrong = [
        f"{key} is {config.get(key, default)!r}, not {value!r}"
        for key, (default, value) in _REQUIRED.items()
        if config.get(key, default) != value
    ]
    if wrong:
        raise CheckpointError(f"{path}: not a Mini-Omni body: {'; '.join(wrong)}")
    return config


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
    raise CheckpointError(f"asr_adapter {kind!r}; known are mlp and llamamlp")


def _layout(config: dict[str, Any], codec_config: dict[str, Any]) -> TokenLayout:
    codec = codecs.spec_of(codec_config)
    audio_vocab = config.get("audio_vocab_size", 4160)
    layout = TokenLayout(config.get("text_vocab_size", 152000), audio_vocab, codec.codebook_size, codec.streams)
    if (rows := config.get("cat_audio_vocab_size", 29120)) != codec.streams * audio_vocab:
        raise CheckpointError(
            f"cat_audio_vocab_size {rows} is not audio_vocab_size {audio_vocab} times the codec's {codec.streams} "
            "streams; use the codec that the model was trained with"
        )
    return layout


def _problems(
    model: OmniModel, padded_vocab: int | None, released: Tensors, whisper: Tensors, snac: Tensors
) -> list[str]:
    expected_whisper = {encoders.openai_name(n): tuple(t.shape) for n, t in model.encoder.state_dict().items()}
    optional = (_LM_HEAD,) if model.spec.tied else ()
    return [
        *differences(_released_shapes(model, padded_vocab), shapes_of(released), optional=optional),
        *differences(expected_whisper, shapes_of(whisper)),
        *differences(shapes_of(model.codec.state_dict()), shapes_of(snac)),
    ]


def _released_name(name: str) -> str:
    """OmniModel's name -> LitGPT's (one fused name for q, k and v)."""
    for pattern, replacement in _BODY_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _llm_shapes(model: OmniModel) -> dict[str, tuple[int, ...]]:
    return {n: s for n, s in shapes_of(model.state_dict()).items() if not n.startswith(("encoder.", "codec."))}


def _released_shapes(model: OmniModel, padded_vocab: int | None) -> dict[str, tuple[int, ...]]:
    spec = model.spec
    rows = max(padded_vocab or 0, spec.layout.joint_vocab)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in _llm_shapes(model).items():
        if name in ("text_head.weight", "audio_head.weight"):
            continue
        if name == "embedding.weight":
            shape = (rows, shape[1])
        if _fused(name):
            shape = ((spec.body.heads + 2 * spec.body.kv_heads) * spec.body.head_dim, *shape[1:])
        shapes[_source(model, name)] = shape
    if model.text_head is not None:
        shapes[_LM_HEAD] = (rows, spec.body.width)
    if spec.tts_layers:
        shapes[_TTS_HEAD] = (spec.layout.streams * spec.layout.audio_vocab, spec.body.width)
    return shapes


def _source(model: OmniModel, name: str) -> str:
    if model.spec.adapter.kind == "linear" and name.startswith("adapter."):
        return name.replace("adapter.proj.", "whisper_adapter.")
    return _released_name(name)


def _fused(name: str) -> re.Match[str] | None:
    return re.search(r"self_attn\.([qkv])_proj\.", name)


def _llm_tensors(model: OmniModel, released: Tensors) -> dict[str, Tensor]:
    layout = model.spec.layout
    joint, text = layout.joint_vocab, layout.text_vocab
    tensors: dict[str, Tensor] = {}
    for name in _llm_shapes(model):
        if name == "text_head.weight":
            tensors[name] = released[_LM_HEAD][:text]
        elif name == "audio_head.weight":
            tensors[name] = released[_TTS_HEAD] if model.spec.tts_layers else released[_LM_HEAD][text:joint]
        elif match := _fused(name):
            tensors[name] = _split_qkv(released[_source(model, name)], model.spec.body, match[1])
        else:
            source = released[_source(model, name)]
            tensors[name] = source[:joint] if name == "embedding.weight" else source
    return tensors


def _split_qkv(fused: Tensor, body: BodySpec, part: str) -> Tensor:
    """[(heads + 2 * kv_heads) * head_dim, ...] interleaved per KV group -> the rows of q, k or v."""
    per_group = body.heads // body.kv_heads
    groups = fused.unflatten(0, (body.kv_heads, per_group + 2, body.head_dim))
    rows = {"q": groups[:, :per_group], "k": groups[:, per_group], "v": groups[:, per_group + 1]}[part]
    return rows.reshape(-1, *fused.shape[1:]).contiguous()
