"""Composition from parts: a Whisper encoder, a Qwen2/Qwen3/Llama/Mistral LLM and a codec -> an OmniModel to be trained.

The parts keep their weights. Adapter, TTS adapter, special tokens and audio rows are new and untrained, so that
provenance says "random".
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UsageError
from ..sampling import check_seed
from ..spec import AdapterSpec, BodySpec, OmniSpec, TokenLayout
from . import codecs, encoders, parts, sources
from .omni import OmniModel, fill, skeleton
from .optimum_graphs import held_against
from .presets import draw
from .tensors import Shapes, shapes_of, translated

logger = logging.getLogger("edgeomni")

AUDIO_SPECIALS = 64
TEXT_SPECIALS = 64
LONGEST_CONTEXT = 2048
MOST_TTS_LAYERS = 100
AdapterKind = Literal["linear", "swiglu"]


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
    """Hub ids or local directories -> OmniModel; `encoder` may also be an openai-whisper .pt file, `llm` a GGUF file;
    both may be directories that `optimum-cli export onnx|openvino` made (optimum_graphs.py).

    `streams` (Mimi only): how many of its codebooks the model speaks, MIMI_STREAMS at most by default.
    New rows are drawn around the mean of the LLM's rows with their spread per dimension. No code of a part is run.
    Raises CheckpointError that names the part which is not supported (told from its config.json, before any weights
    are read), cannot be read or does not fit; UsageError for a seed or a number of TTS layers out of range.
    """
    check_seed(seed)
    check_tts_layers(tts_layers)
    speech_config, body_config, voice_config = parts.check(encoder, llm, codec, streams)
    speech = parts.read_encoder(encoder, speech_config)
    body = parts.read_llm(llm, body_config)
    voice = parts.read_codec(codec, voice_config, streams)
    with translated(f"{encoder}, {llm} and {codec} do not fit together"):
        spec = _spec_of(speech, body, voice, adapter, tts_layers)
        model = skeleton(spec, voice.config)
    parts.refuse_misfits(encoder, shapes_of(model.encoder.state_dict()), speech.state)
    parts.refuse_misfits(llm, llm_shapes(model, body), body.state)
    parts.refuse_misfits(codec, shapes_of(model.codec.state_dict()), voice.state)
    given = {
        **{f"encoder.{n}": t for n, t in speech.state.items()},
        **{f"codec.{n}": t for n, t in voice.state.items()},
        **_llm_tensors(body, spec, seed),
    }
    shapes = shapes_of(model.state_dict())
    fill(model, {name: given[name] if name in given else draw(name, shape, seed) for name, shape in shapes.items()})
    model.tokenizer_json = sources.tokenizer_json(llm)
    model.provenance = _provenance({"encoder": encoder, "llm": llm, "codec": codec}, seed, tts_layers)
    note_graphs(model, {"encoder": encoder, "llm": llm})
    model.licences = {part: sources.licence(s) for part, s in (("encoder", encoder), ("llm", llm), ("codec", codec))}
    note_limit(model, body)
    return model


def note_graphs(model: OmniModel, given: Mapping[str, str]) -> None:
    """Holds the parts that were read from optimum's graphs against those, and writes the result into the provenance.

    Raises CheckpointError where they differ.
    """
    if told := held_against(model, given):
        model.provenance["held_against"] = told
        logger.info("%s", told)


def note_limit(model: OmniModel, llm: parts.Llm) -> None:
    """Tells why the context is shorter than the LLM's positions, and writes it into the provenance."""
    if llm.limit and model.spec.context == llm.context:
        model.provenance["limit"] = llm.limit
        logger.warning("%s", llm.limit)


def check_tts_layers(layers: int) -> None:
    """Raises UsageError for a number of TTS layers out of range."""
    if not 0 <= layers <= MOST_TTS_LAYERS:
        raise UsageError(f"the TTS adapter may have 0 to {MOST_TTS_LAYERS} layers, not {layers}")


def adapter_spec(kind: AdapterKind, body: BodySpec) -> AdapterSpec:
    """The adapter of that kind that a composed model gets before that body."""
    return AdapterSpec("linear", bias=True) if kind == "linear" else AdapterSpec(kind, body.ffn)


def _spec_of(
    speech: parts.Encoder, body: parts.Llm, voice: parts.Codec, adapter: AdapterKind, tts_layers: int
) -> OmniSpec:
    codec, body_spec = codecs.spec_of(voice.config), body.spec
    layout = TokenLayout(
        body.vocab + TEXT_SPECIALS,
        codec.codebook_size + AUDIO_SPECIALS,
        codec.codebook_size,
        codec.streams,
        TEXT_SPECIALS,
    )
    return OmniSpec(
        front_end=encoders.front_end(speech.spec, speech.n_mels),
        encoder=speech.spec,
        adapter=adapter_spec(adapter, body_spec),
        body=body_spec,
        layout=layout,
        codec=codec,
        tied=body.tied,
        context=min(body.context, LONGEST_CONTEXT),
        tts_layers=tts_layers,
    )


def llm_shapes(model: OmniModel, llm: parts.Llm) -> Shapes:
    """The shapes that the LLM's own files must have: its body without TTS adapter and new rows."""
    words = (llm.vocab, llm.spec.width)
    heads = {} if llm.tied else {"lm_head.weight": words}
    return {"embed_tokens.weight": words, **shapes_of(model.body.state_dict()), **heads}


def _llm_tensors(llm: parts.Llm, spec: OmniSpec, seed: int) -> dict[str, Tensor]:
    layout = spec.layout
    generator = torch.Generator().manual_seed(seed)
    audio = layout.streams * layout.audio_vocab
    whole_tables = ("embed_tokens.weight", "lm_head.weight")
    tensors = {f"body.{n}": t for n, t in llm.state.items() if n not in whole_tables}
    words = llm.embedding.float()
    tensors["embedding.weight"] = torch.cat([words, new_rows(words, layout.text_specials + audio, generator)])
    if llm.head is not None:
        head = llm.head.float()
        tensors["text_head.weight"] = torch.cat([head, new_rows(head, layout.text_specials, generator)])
        tensors["audio_head.weight"] = new_rows(head, audio, generator)
    elif spec.tts_layers:
        tensors["audio_head.weight"] = new_rows(words, audio, generator)
    return tensors


def new_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows drawn around the mean of `rows` [V, D], with their standard deviation per dimension."""
    spread = rows.std(0) if len(rows) > 1 else torch.ones_like(rows[0])
    return torch.randn((count, rows.shape[1]), generator=generator) * spread + rows.mean(0)


def _provenance(given: dict[str, str], seed: int, tts_layers: int) -> dict[str, Any]:
    marks = [f"{part} {sources.mark(source)}" for part, source in given.items()]
    untrained = ["adapter", *(["TTS adapter"] if tts_layers else []), "special tokens", "audio rows"]
    return {
        "weights": "random",
        "kind": "composed",
        "untrained": ", ".join(untrained),
        "source": ", ".join(f"{part} {sources.short_name(source)}" for part, source in given.items()),
        "seed": seed,
        "source_hash": hashlib.sha256("\n".join([*marks, str(seed)]).encode()).hexdigest(),
    }
