"""Composition from parts: a Whisper encoder, a Qwen2/Qwen3/Llama LLM and a codec -> an OmniModel to be trained.

The parts keep their weights. Adapter, TTS adapter, special tokens and audio rows are new and untrained, so that
provenance says "random".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, MimiModel, PreTrainedModel, WhisperModel
from transformers.utils import cached_file

from ..errors import CheckpointError, SpecError
from ..spec import AdapterSpec, EncoderSpec, OmniSpec, TokenLayout
from . import bodies, codecs, encoders, mini_omni
from .omni import OmniModel, fill, skeleton
from .presets import draw
from .tensors import differences, digest, read_safetensors, read_torch, refuse, shapes_of, state_of

AUDIO_SPECIALS = 64
TEXT_SPECIALS = 64
LONGEST_CONTEXT = 2048
MIMI_STREAMS = 8
_T = TypeVar("_T")
AdapterKind = Literal["linear", "swiglu"]
# As the hub pages of these parts state them.
_KNOWN_LICENCES = {
    "openai/whisper": "Apache-2.0",
    "Qwen/Qwen2-": "Apache-2.0",
    "Qwen/Qwen3-": "Apache-2.0",
    "hubertsiuzdak/snac": "MIT",
    "kyutai/mimi": "CC-BY-4.0",
}


@dataclass(frozen=True)
class _Encoder:
    spec: EncoderSpec
    n_mels: int
    state: dict[str, Tensor]


@dataclass(frozen=True)
class _Codec:
    config: dict[str, Any]
    state: dict[str, Tensor]


def compose(
    encoder: str,
    llm: str,
    codec: str,
    *,
    adapter: AdapterKind = "swiglu",
    tts_layers: int = 0,
    streams: int | None = None,
    seed: int = 0,
) -> OmniModel:
    """Hub ids or local directories -> OmniModel; `encoder` may also be an openai-whisper .pt file.

    `streams` (Mimi only): how many of its codebooks the model speaks, MIMI_STREAMS at most by default.
    New rows are drawn around the mean of the LLM's rows with their spread per dimension.
    Raises CheckpointError that names the part which cannot be read or does not fit.
    """
    speech, body, voice = _read_encoder(encoder), _read_llm(llm), _read_codec(codec, streams)
    try:
        spec = _spec_of(speech, body, voice, adapter, tts_layers, llm)
    except SpecError as exc:
        raise CheckpointError(f"{encoder}, {llm} and {codec} do not fit together: {exc}") from exc
    model = skeleton(spec, voice.config)
    refuse(encoder, differences(shapes_of(model.encoder.state_dict()), shapes_of(speech.state)))
    refuse(codec, differences(shapes_of(model.codec.state_dict()), shapes_of(voice.state)))
    given = {
        **{f"encoder.{n}": t for n, t in speech.state.items()},
        **{f"codec.{n}": t for n, t in voice.state.items()},
        **_llm_tensors(body, spec, seed),
    }
    shapes = shapes_of(model.state_dict())
    fill(model, {name: given[name] if name in given else draw(name, shape, seed) for name, shape in shapes.items()})
    model.tokenizer_json = _tokenizer(llm)
    model.provenance = _provenance({"encoder": encoder, "llm": llm, "codec": codec}, seed)
    model.licences = {part: _licence(s) for part, s in (("encoder", encoder), ("llm", llm), ("codec", codec))}
    return model


def _spec_of(
    speech: _Encoder, body: PreTrainedModel, voice: _Codec, adapter: AdapterKind, tts_layers: int, llm: str
) -> OmniSpec:
    codec, body_spec = codecs.spec_of(voice.config), bodies.spec_of(body.config, llm)
    adapter_spec = AdapterSpec("linear", bias=True) if adapter == "linear" else AdapterSpec(adapter, body_spec.ffn)
    layout = TokenLayout(
        len(body.get_input_embeddings().weight) + TEXT_SPECIALS,
        codec.codebook_size + AUDIO_SPECIALS,
        codec.codebook_size,
        codec.streams,
        TEXT_SPECIALS,
    )
    return OmniSpec(
        front_end=encoders.front_end(speech.spec, speech.n_mels),
        encoder=speech.spec,
        adapter=adapter_spec,
        body=body_spec,
        layout=layout,
        codec=codec,
        tied=bool(body.config.tie_word_embeddings),
        context=min(bodies.max_context(body.config), LONGEST_CONTEXT),
        tts_layers=tts_layers,
    )


def _llm_tensors(llm: PreTrainedModel, spec: OmniSpec, seed: int) -> dict[str, Tensor]:
    layout = spec.layout
    generator = torch.Generator().manual_seed(seed)
    audio = layout.streams * layout.audio_vocab
    body = llm.base_model.state_dict()
    tensors = {f"body.{n}": t for n, t in body.items() if n != "embed_tokens.weight"}
    words = llm.get_input_embeddings().weight.detach()
    tensors["embedding.weight"] = torch.cat([words, _new_rows(words, layout.text_specials + audio, generator)])
    if not spec.tied:
        head = llm.get_output_embeddings().weight.detach()
        tensors["text_head.weight"] = torch.cat([head, _new_rows(head, layout.text_specials, generator)])
        tensors["audio_head.weight"] = _new_rows(head, audio, generator)
    elif spec.tts_layers:
        tensors["audio_head.weight"] = _new_rows(words, audio, generator)
    return tensors


def _new_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows drawn around the mean of `rows` [V, D], with their standard deviation per dimension."""
    spread = rows.std(0) if len(rows) > 1 else torch.ones_like(rows[0])
    return torch.randn((count, rows.shape[1]), generator=generator) * spread + rows.mean(0)


def _read_encoder(source: str) -> _Encoder:
    if Path(source).is_file():
        spec, n_mels, state = encoders.from_openai(read_torch(Path(source)), source)
        names = encoders.build(spec, n_mels).state_dict() if state else {}
        return _Encoder(spec, n_mels, {n: state[o] for n in names if (o := encoders.openai_name(n)) in state})
    model = _pretrained(source, WhisperModel, "a Whisper encoder")
    spec, n_mels = encoders.from_transformers(model.config)
    return _Encoder(spec, n_mels, model.encoder.state_dict())


def _read_llm(source: str) -> PreTrainedModel:
    model = _pretrained(source, AutoModelForCausalLM, "a language model")
    bodies.spec_of(model.config, source)
    return model


def _read_codec(source: str, streams: int | None) -> _Codec:
    config_path = _hub_file(source, "config.json", required=True)
    assert config_path is not None
    if _json(config_path).get("model_type") == "mimi":
        model = _pretrained(source, MimiModel, "a Mimi codec")
        streams = streams or min(MIMI_STREAMS, model.config.num_quantizers)
        return _Codec({"kind": "mimi", "streams": streams, "config": model.config.to_dict()}, model.state_dict())
    config = mini_omni.snac_config(config_path)
    if (path := _hub_file(source, "model.safetensors")) is not None:
        return _Codec(config, codecs.modern_names(read_safetensors(path)))
    if (path := _hub_file(source, "pytorch_model.bin")) is None:
        raise CheckpointError(f"{source}: no pytorch_model.bin or model.safetensors; download the codec again")
    return _Codec(config, codecs.modern_names(state_of(read_torch(path), path)))


def _pretrained(source: str, cls: Any, what: str) -> Any:
    model, info = _translated(
        source, what, lambda: cls.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    )
    missing = [f"missing: {name}" for name in sorted(info["missing_keys"])]
    refuse(source, missing + [f"wrong shape: {' '.join(map(str, key))}" for key in sorted(info["mismatched_keys"])])
    return model.eval()


def _translated(source: str, what: str, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as exc:
        first = (str(exc).splitlines() or [type(exc).__name__])[0]
        raise CheckpointError(
            f"{source}: not readable as {what} ({first}); give a local directory, or a hub id with the network up"
        ) from exc


def _hub_file(source: str, name: str, *, required: bool = False) -> Path | None:
    found = _translated(
        source,
        f"a part with {name}",
        lambda: cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=required,
            _raise_exceptions_for_connection_errors=required,
        ),
    )
    return Path(found) if found else None


def _tokenizer(source: str) -> str | None:
    path = _hub_file(source, "tokenizer.json")
    return path.read_text(encoding="utf-8") if path else None


def _json(path: Path) -> dict[str, Any]:
    return dict(_translated(str(path), "JSON", lambda: json.loads(path.read_text(encoding="utf-8"))))


def _provenance(parts: dict[str, str], seed: int) -> dict[str, Any]:
    marks = [f"{part} {_mark(source)}" for part, source in parts.items()]
    return {
        "weights": "random",
        "kind": "composed",
        "untrained": "adapter, TTS adapter, special tokens, audio rows",
        "source": ", ".join(f"{part} {_name(source)}" for part, source in parts.items()),
        "seed": seed,
        "source_hash": hashlib.sha256("\n".join([*marks, str(seed)]).encode()).hexdigest(),
    }


def _mark(source: str) -> str:
    """What tells one version of a part from another: the files' hash, or the hub's commit."""
    path = Path(source)
    if path.exists():
        return digest([path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()])
    config = _hub_file(source, "config.json")
    return f"{source}@{config.parent.name if config else 'unknown'}"


def _name(source: str) -> str:
    return Path(source).resolve().name if Path(source).exists() else source


def _licence(source: str) -> str:
    for prefix, licence in _KNOWN_LICENCES.items():
        if source.startswith(prefix):
            return f"{licence} ({source})"
    readme = Path(source) / "README.md"
    stated = re.search(r"^license:\s*(\S+)", readme.read_text(encoding="utf-8"), re.M) if readme.is_file() else None
    return f"{stated[1] if stated else 'not stated'} ({_name(source)})"
