"""OmniModel: speech encoder, adapter, embedding, body, heads, optional TTS adapter and codec in one module.

The parallel-stream model of Mini-Omni (arXiv 2408.16725): a frame's input is the mean of its K+1 embeddings, at
audio positions of a prompt the K audio embeddings are replaced by the adapter's feature of that position; every
frame gives one distribution per stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quantize.schemes import ChosenCodes
from ..recorded import Recorded
from ..spec import OmniSpec
from . import bodies, codecs, encoders
from .bodies import KVCache
from .tensors import translated
from .tts_adapter import TtsAdapter


class OmniModel(nn.Module):
    """All sizes come from `spec`; `codec_config` is what model/codecs.py builds the codec from.

    Provenance holds "weights" ("trained" or "random"), "source" and "source_hash". `chosen_codes` gives the codes that
    an export stores of a parameter where they were chosen beforehand (quantize/calibrate.py), and is None otherwise.
    `recorded` is what an export is to measure ranges on, None for what the exporter makes up.
    """

    def __init__(self, spec: OmniSpec, codec_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.codec_config = dict(codec_config)
        self.tokenizer_json: str | None = None
        self.provenance: dict[str, Any] = {}
        self.licences: dict[str, str] = {}
        self.chosen_codes: ChosenCodes | None = None
        self.recorded: Recorded | None = None
        width, layout = spec.body.width, spec.layout
        self.encoder = encoders.build(spec.encoder, spec.front_end.n_mels)
        self.adapter = encoders.build_adapter(spec.adapter, spec.encoder.width, width)
        self.embedding = nn.Embedding(layout.joint_vocab, width)
        self.body = bodies.build(spec.body, spec.context, spec.tts_layers)
        self.tts = _split_tts(self.body, spec.body.layers) if spec.tts_layers else None
        self.text_head = None if spec.tied else nn.Linear(width, layout.text_vocab, bias=False)
        own_audio_head = spec.tts_layers or not spec.tied
        self.audio_head = nn.Linear(width, layout.streams * layout.audio_vocab, bias=False) if own_audio_head else None
        self.codec = codecs.build(codec_config)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def encode(self, mel: Tensor) -> Tensor:
        """Log-mel [B, n_mels, t] (t even, t // 2 <= encoder context) -> features [B, t // 2, D]."""
        return self.adapter(encoders.encode(self.encoder, mel))

    def embed(self, ids: Tensor, features: Sequence[tuple[int, Tensor]] = ()) -> Tensor:
        """ids [B, K+1, T] int (joint vocabulary, audio streams first, text last) -> [B, T, D].

        Each segment (start, values [F, D]) of `features` replaces the K audio embeddings of every row at positions
        start .. start + F - 1.
        """
        streams = self.spec.layout.streams
        parts = self.embedding(ids)
        audio, text = parts[:, :streams].sum(1), parts[:, streams]
        for start, values in features:
            end = start + len(values)
            if start < 0 or end > ids.shape[-1]:
                raise ValueError(f"{len(values)} features from position {start} exceed {ids.shape[-1]} ids")
            replaced = (streams * values).expand(len(ids), -1, -1)
            audio = torch.cat([audio[:, :start], replaced, audio[:, end:]], dim=1)
        return (audio + text) / (streams + 1)

    def body_out(self, embeds: Tensor, cache: KVCache | None = None) -> Tensor:
        """embeds [B, T, D] -> the body's output [B, T, D], un-normed. Does not advance `cache`."""
        return bodies.run_layers(self.body.layers, self.body.rotary_emb, embeds, cache)

    def tts_out(self, body_out: Tensor, cache: KVCache | None = None) -> Tensor:
        """Un-normed body output [B, T, D] -> what the audio heads read of the TTS adapter [B, T, D]."""
        if self.tts is None:
            raise ValueError("this model has no TTS adapter")
        return self.tts(body_out, self.body.rotary_emb, cache)

    def hidden(self, embeds: Tensor, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """embeds [B, T, D] -> what text and audio heads read, each [B, T, D]; `cache` advances by T."""
        out = self.body_out(embeds, cache)
        text = self.body.norm(out)
        audio = text if self.tts is None else self.tts_out(out, cache)
        if cache is not None:
            cache.advance(embeds.shape[1])
        return text, audio

    def text_rows(self) -> Tensor:
        """The text head's rows [text_vocab, D]; a view of the embedding where tied."""
        return self.embedding.weight[: self.spec.layout.text_vocab] if self.text_head is None else self.text_head.weight

    def audio_rows(self) -> Tensor:
        """The audio heads' rows [K * audio_vocab, D], stream by stream; a view of the embedding where tied."""
        if self.audio_head is None:
            return self.embedding.weight[self.spec.layout.text_vocab :]
        return self.audio_head.weight

    def text_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., text_vocab]."""
        return F.linear(hidden, self.text_rows())

    def audio_logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., K, audio_vocab]."""
        layout = self.spec.layout
        return F.linear(hidden, self.audio_rows()).unflatten(-1, (layout.streams, layout.audio_vocab))

    def forward(self, ids: Tensor, features: Sequence[tuple[int, Tensor]] = ()) -> tuple[Tensor, Tensor]:
        """ids [B, K+1, T] -> text logits [B, T, text_vocab], audio logits [B, T, K, audio_vocab]."""
        text, audio = self.hidden(self.embed(ids, features))
        return self.text_logits(text), self.audio_logits(audio)

    def new_cache(self, rows: int, max_frames: int) -> KVCache:
        """An empty cache for the body's and the TTS adapter's layers, in the model's dtype, on its device."""
        layers = self.spec.body.layers + self.spec.tts_layers
        weight = self.body.norm.weight
        return KVCache(self.spec.body, layers, rows, max_frames, device=weight.device, dtype=weight.dtype)

    def decode_codes(self, codes: Sequence[Tensor], noise: codecs.Noise = None) -> Tensor:
        """codes[level] int64 [1, n * ids_per_level] -> waveform [S], offline; noise off unless given."""
        return codecs.decode(self.codec, codes, noise)


def skeleton(spec: OmniSpec, codec_config: Mapping[str, Any]) -> OmniModel:
    """The model with its weights on `meta`: shapes without memory, to be filled by `fill`.

    Its time and memory grow with the number of layers, so those are to be checked before (tensors.refuse_deeper).
    Raises CheckpointError for sizes of which no model can be built.
    """
    with translated("no model can be built of these sizes"), torch.device("meta"):
        return OmniModel(spec, codec_config).eval()


def fill(model: OmniModel, tensors: Mapping[str, Tensor]) -> OmniModel:
    """Puts tensors, one per name of the state dict and of its shape, into a skeleton without copying float32.

    The codec's and the rotary buffers are no part of a state dict, so they are computed here, off `meta`.
    """
    model.codec = codecs.build(model.codec_config)
    model.load_state_dict({name: _as_parameter(t) for name, t in tensors.items()}, strict=True, assign=True)
    bodies.rebuild_rotary(model.body)
    return model.eval()


def _as_parameter(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _split_tts(body: nn.Module, layers: int) -> TtsAdapter:
    """The body was built with the TTS adapter's blocks as its last ones, so that layer indices run on."""
    adapter = TtsAdapter(body.layers[layers:], type(body.norm)(body.config.hidden_size, body.config.rms_norm_eps))
    body.layers = body.layers[:layers]
    return adapter
