"""The parts that a model is composed of: a Whisper encoder, a Qwen2/Qwen3/Llama/Mistral LLM, a SNAC or Mimi codec.

Whether a part is supported is decided from its config.json alone, before any weights are read.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MimiConfig
from transformers import WhisperConfig as Whisper

from ..errors import CheckpointError
from ..spec import BodySpec, EncoderSpec
from . import bodies, codecs, encoders, sources
from .optimum_graphs import GraphWeights, graph_of
from .tensors import Shapes, differences, read_torch, refuse, refuse_deeper, refuse_unusable, shapes_of, translated

MIMI_STREAMS = 8
"""Codebooks of Mimi that a composed model speaks unless told otherwise, as Moshi does (arXiv 2410.00037)."""
Config = dict[str, Any]


@dataclass(frozen=True)
class Encoder:
    """A speech encoder and its tensors, under transformers' names for WhisperEncoder."""

    spec: EncoderSpec
    n_mels: int
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Llm:
    """A language model: its body's tensors, its embedding [vocab, D], its text head [vocab, D] (None where tied).

    `context`: frames up to which it attends to all of them; `limit` says why that is fewer than its positions.
    """

    spec: BodySpec
    vocab: int
    context: int
    limit: str | None
    state: dict[str, Tensor]

    @property
    def embedding(self) -> Tensor:
        return self.state["embed_tokens.weight"]

    @property
    def head(self) -> Tensor | None:
        return self.state.get("lm_head.weight")

    @property
    def tied(self) -> bool:
        return self.head is None


@dataclass(frozen=True)
class Codec:
    """A codec's configuration (as model/codecs.py takes it) and its tensors."""

    config: Config
    state: dict[str, Tensor]


def check(encoder: str, llm: str, codec: str, streams: int | None) -> tuple[Config | None, Config, Config]:
    """The three config.json, each of a supported part; None for an encoder that is an openai-whisper .pt file.

    Raises CheckpointError for a path that does not exist, an unsupported type, code or quantized weights in a part,
    and for `streams` that the codec does not have.
    """
    for source in (encoder, llm, codec):
        sources.check_exists(source)
    return check_encoder(encoder), check_llm(llm), check_codec(codec, streams)


def check_encoder(source: str) -> Config | None:
    """As `check`, of the encoder alone."""
    sources.check_exists(source)
    return None if Path(source).is_file() else _checked(source, "encoder", ("whisper",))


def check_llm(source: str) -> Config:
    """As `check`, of the LLM alone."""
    sources.check_exists(source)
    return _checked(source, "LLM", tuple(bodies.LLMS))


def check_codec(source: str, streams: int | None) -> Config:
    """As `check`, of the codec alone."""
    sources.check_exists(source)
    config = sources.config_json(source)
    if "model_type" in config or "vq_strides" not in config:  # SNAC's config.json names no type
        _check_type(source, config, "codec", ("snac", "mimi"))
    codecs.check_streams(_codec_config(config, streams), streams)
    return config


def read_encoder(source: str, config: Config | None) -> Encoder:
    """Raises CheckpointError where the encoder's weights cannot be read."""
    if config is None:
        spec, n_mels, state = encoders.from_openai(read_torch(Path(source)), source)
        refuse_deeper(source, {"n_audio_layer": spec.layers}, len(state))
        names = encoders.names(spec)
        return Encoder(spec, n_mels, {n: state[o] for n in names if (o := encoders.openai_name(n)) in state})
    with translated(f"{source}: config.json is no Whisper configuration"):
        spec, n_mels = encoders.from_transformers(Whisper.from_dict(dict(config)))
    if graph := graph_of(source, "encoder"):
        layers = {"encoder_layers": spec.layers}
        return Encoder(spec, n_mels, _from_graph(graph, layers, lambda: encoders.build(spec, n_mels)))
    state = {
        name.removeprefix("model.").removeprefix("encoder."): tensor
        for name, tensor in sources.weights(source, lambda n: n.removeprefix("model.").startswith("encoder.")).items()
    }
    refuse_deeper(source, {"encoder_layers": spec.layers}, len(state))
    return Encoder(spec, n_mels, state)


def read_llm(source: str, config: Config) -> Llm:
    """Raises CheckpointError where the LLM's weights cannot be read, or differ from what its config.json says."""
    graph, layers = graph_of(source, "llm"), {"num_hidden_layers": config.get("num_hidden_layers", 0)}
    state: dict[str, Tensor] = {}
    if graph is None:
        found = sources.weights(source, lambda name: not name.endswith(".rotary_emb.inv_freq"))
        state = {name.removeprefix("model."): tensor for name, tensor in found.items()}
        refuse_deeper(source, layers, len(state))
    with translated(f"{source}: config.json is no {config['model_type']} configuration"):
        typed = bodies.LLMS[config["model_type"]].from_dict(dict(config))
        spec, context = bodies.spec_of(typed, source), bodies.max_context(typed)
    if graph is not None:
        words = (typed.vocab_size, spec.width)
        tables = {"embed_tokens.weight": words, **({} if typed.tie_word_embeddings else {"lm_head.weight": words})}
        state = _from_graph(graph, layers, lambda: bodies.build(spec, 1), tables)
    if typed.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    limit = None
    if context < typed.max_position_embeddings:
        limit = f"the LLM attends to the last {context} frames only, so the context is {context}"
    return Llm(spec, typed.vocab_size, context, limit, state)


def read_codec(source: str, config: Config, streams: int | None) -> Codec:
    """Raises CheckpointError where the codec's weights cannot be read."""
    chosen = _codec_config(config, streams)
    state = sources.weights(source)
    refuse_deeper(source, codecs.depths(chosen), len(state))
    if chosen["kind"] == "snac":
        return Codec(chosen, codecs.modern_names(state))
    refuse_unusable(source, state)
    return Codec(chosen, codecs.mimi_tensors(chosen, state, source))


def _from_graph(
    graph: Path, layers: Config, build: Callable[[], nn.Module], more: Shapes | None = None
) -> dict[str, Tensor]:
    """The tensors of the module that `build` makes, and `more`, read out of a graph that optimum wrote.

    `layers`: the configuration's name of each number of layers, and its value, checked before anything is built.
    """
    weights = GraphWeights(graph)
    weights.refuse_deeper(layers)
    with translated(f"{graph}: no model can be built of its config.json"), torch.device("meta"):
        shapes = shapes_of(build().state_dict())
    return weights.read({**shapes, **(more or {})})


def refuse_misfits(source: str, expected: Shapes, state: dict[str, Tensor]) -> None:
    """Raises CheckpointError naming all tensors that do not have the configuration's shapes, or hold no numbers."""
    refuse(source, differences(expected, shapes_of(state)))
    refuse_unusable(source, state)


def _codec_config(config: Config, streams: int | None) -> Config:
    if config.get("model_type") != "mimi":
        return {**config, "kind": "snac"}
    have = config.get("num_quantizers", MimiConfig().num_quantizers)
    spoken = streams
    if spoken is None:
        spoken = min(MIMI_STREAMS, have) if isinstance(have, int) else MIMI_STREAMS
    with translated("config.json is no Mimi configuration"):
        return {"kind": "mimi", "streams": spoken, "config": MimiConfig.from_dict(dict(config)).to_dict()}


def _checked(source: str, what: str, supported: tuple[str, ...]) -> Config:
    config = sources.config_json(source)
    _check_type(source, config, what, supported)
    return config


def _check_type(source: str, config: Config, what: str, supported: tuple[str, ...]) -> None:
    kind, known = config.get("model_type"), ", ".join(supported)
    if config.get("auto_map"):
        raise CheckpointError(
            f"{source}: config.json names Python code of its own (auto_map), and code in a checkpoint is never run; "
            f"use a part that transformers itself defines ({what} types supported are {known})"
        )
    if kind is None:
        raise CheckpointError(f"{source}: config.json has no model_type; {what} types supported are {known}")
    if kind not in supported:
        raise CheckpointError(f"{source}: {what} type {reprlib.repr(kind)}; supported are {known}")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{source}: its weights are quantized (quantization_config); give the original weights, and let "
            "`edgeomni export` quantize them"
        )
