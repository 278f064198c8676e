"""A part of a checkpoint replaced by another one: what fits is kept, what does not is new, and training goes on.

Rows that cannot be kept are drawn at the statistics of those whose place they take. Which training stages have to be
run again follows from what each of them trains (arXiv 2408.16725, section 3.3): 1 the adapter and the audio rows,
before a frozen LLM; 2 the LLM, answering in text; 3 all together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..chat import ChatSpec
from ..errors import UsageError
from ..sampling import check_seed
from ..spec import AdapterSpec, BodySpec, OmniSpec, TokenLayout
from . import codecs, compose, encoders, parts, sources
from .compose import AdapterKind, new_rows
from .omni import OmniModel, fill, skeleton
from .presets import draw
from .swap_notes import Fit, Notes, notes_of
from .tensors import shapes_of, translated

_BLOCK = ("kind", "width", "heads", "kv_heads", "head_dim", "ffn", "qkv_bias", "o_bias", "mlp_bias", "qk_norm")
"""What a block of the body is made by; the TTS adapter consists of such blocks."""


@dataclass(frozen=True)
class Swapped:
    """The new model, and what is to be told of it."""

    model: OmniModel
    notes: Notes


@dataclass(frozen=True)
class _Parts:
    """The parts that replace others; None: the checkpoint keeps its own."""

    encoder: parts.Encoder | None
    llm: parts.Llm | None
    codec: parts.Codec | None


def swap(
    old: OmniModel,
    *,
    encoder: str | None = None,
    llm: str | None = None,
    codec: str | None = None,
    adapter: AdapterKind | None = None,
    tts_layers: int | None = None,
    streams: int | None = None,
    seed: int = 0,
) -> Swapped:
    """`old` with other parts, each a hub id or a local directory as `compose` takes them.

    Encoder: the adapter is kept where the widths agree. Codec: the audio rows are kept where streams and codebook
    size agree; where only its decoder is another (`train-codec --decoder-only`), nothing has to be trained again. LLM:
    special tokens and audio rows are kept where its width does, the TTS adapter where its blocks fit. All else that
    belongs to the LLM is the new one's: body, text rows, tokenizer; the chat template returns to the
    default. `adapter`, `tts_layers`: of what becomes new, as it was by default. `streams` as in `compose`; a Mimi in
    place of a Mimi speaks as many as before. The new model takes over the tensors of `old`, uncopied.

    Raises UsageError where no part is given or an option has no effect, CheckpointError as `compose` does.
    """
    given = {name: source for name, source in (("encoder", encoder), ("llm", llm), ("codec", codec)) if source}
    check_options(given, adapter, tts_layers, streams)
    check_seed(seed)
    new = _read(old.spec, given, streams)
    with translated(f"{', '.join(given.values())} and the checkpoint do not fit together"):
        spec = _spec_of(old.spec, new, adapter, tts_layers)
        model = skeleton(spec, new.codec.config if new.codec else old.codec_config)
    _refuse_misfits(model, given, new)
    fit = replace(_fit_of(old.spec, spec, given), codes=_same_codes(old, new.codec))
    if adapter and fit.adapter:
        raise UsageError(
            f"--adapter {adapter} is what the checkpoint has, and it fits and is kept; leave --adapter out"
        )
    tensors = _tensors(old, spec, new, fit, seed)
    fill(model, {n: tensors[n] if n in tensors else draw(n, s, seed) for n, s in shapes_of(model.state_dict()).items()})
    notes = notes_of(given, fit, old.provenance, old.spec, spec)
    _describe(model, old, given, new, notes, seed)
    return Swapped(model, notes)


def check_options(
    given: Collection[str], adapter: AdapterKind | None, tts_layers: int | None, streams: int | None
) -> None:
    """Raises UsageError where `given` ("encoder", "llm", "codec") names no part, or not the one an option is about."""
    if not given:
        raise UsageError("nothing to swap: give --encoder, --llm or --codec beside --from")
    if streams is not None and "codec" not in given:
        raise UsageError("--streams is for a Mimi codec: give --codec with it")
    if adapter is not None and not {"encoder", "llm"} & set(given):
        raise UsageError("--adapter goes with --encoder or --llm; another codec leaves the adapter as it is")
    if tts_layers is not None:
        if "llm" not in given:
            raise UsageError("--tts-layers goes with --llm: the blocks of a TTS adapter are the LLM's")
        compose.check_tts_layers(tts_layers)


def _read(old: OmniSpec, given: dict[str, str], streams: int | None) -> _Parts:
    """The new parts' weights, after all of their configurations have been checked."""
    encoder, llm, codec = (given.get(name) for name in ("encoder", "llm", "codec"))
    for source in given.values():
        sources.check_exists(source)
    speech = parts.check_encoder(encoder) if encoder else None
    body = parts.check_llm(llm) if llm else None
    voice = parts.check_codec(codec, streams) if codec else None
    if voice and streams is None and old.codec.kind == "mimi" == voice.get("model_type"):
        streams = min(old.codec.streams, voice.get("num_quantizers", old.codec.streams))
    return _Parts(
        parts.read_encoder(encoder, speech) if encoder else None,
        parts.read_llm(llm, body) if llm and body else None,
        parts.read_codec(codec, voice, streams) if codec and voice else None,
    )


def _spec_of(old: OmniSpec, new: _Parts, adapter: AdapterKind | None, tts_layers: int | None) -> OmniSpec:
    spec = old
    if new.encoder:
        front_end = encoders.front_end(new.encoder.spec, new.encoder.n_mels)
        spec = replace(spec, encoder=new.encoder.spec, front_end=front_end)
    if new.llm:
        context = min(new.llm.context, compose.LONGEST_CONTEXT)
        spec = replace(spec, body=new.llm.spec, tied=new.llm.tied, context=context, chat=ChatSpec())
    if tts_layers is not None:
        spec = replace(spec, tts_layers=tts_layers)
    codec = codecs.spec_of(new.codec.config) if new.codec else old.codec
    layout = old.layout
    layout = TokenLayout(
        new.llm.vocab + layout.text_specials if new.llm else layout.text_vocab,
        codec.codebook_size + layout.audio_vocab - layout.codebook_size,
        codec.codebook_size,
        codec.streams,
        layout.text_specials,
    )
    return replace(spec, codec=codec, layout=layout, adapter=_adapter_spec(old, spec.body, adapter))


def _adapter_spec(old: OmniSpec, body: BodySpec, kind: AdapterKind | None) -> AdapterSpec:
    if kind and kind != old.adapter.kind:
        return compose.adapter_spec(kind, body)
    if old.adapter.kind == "linear" or body.width == old.body.width:
        return old.adapter
    return replace(old.adapter, hidden=body.ffn)


def _refuse_misfits(model: OmniModel, given: dict[str, str], new: _Parts) -> None:
    if new.encoder:
        parts.refuse_misfits(given["encoder"], shapes_of(model.encoder.state_dict()), new.encoder.state)
    if new.llm:
        parts.refuse_misfits(given["llm"], compose.llm_shapes(model, new.llm), new.llm.state)
    if new.codec:
        parts.refuse_misfits(given["codec"], shapes_of(model.codec.state_dict()), new.codec.state)


def _fit_of(old: OmniSpec, new: OmniSpec, given: dict[str, str]) -> Fit:
    def same(*names: str) -> bool:
        return all(getattr(old.body, name) == getattr(new.body, name) for name in names)

    width = same("width")
    voices = [(spec.layout.streams, spec.layout.codebook_size) for spec in (old, new)]
    return Fit(
        adapter=width and old.encoder.width == new.encoder.width and old.adapter == new.adapter,
        specials=width,
        audio_rows=width and voices[0] == voices[1],
        tts=bool(new.tts_layers) and new.tts_layers == old.tts_layers and same(*_BLOCK),
    )


def _same_codes(old: OmniModel, codec: parts.Codec | None) -> bool:
    """Whether the new codec's tensors are the old one's, its decoder apart."""
    if codec is None or codec.config != old.codec_config:
        return False
    before, after = (
        {name: t.float() for name, t in state.items() if not name.startswith("decoder.")}
        for state in (old.codec.state_dict(), codec.state)
    )
    return before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())


def _tensors(old: OmniModel, spec: OmniSpec, new: _Parts, fit: Fit, seed: int) -> dict[str, Tensor]:
    """All tensors that are not to be drawn from nothing, under their names in the model."""
    kept = {
        "encoder": new.encoder is None,
        "codec": new.codec is None,
        "body": new.llm is None,
        "adapter": fit.adapter,
        "tts": fit.tts,
    }
    tensors = {name: t for name, t in old.state_dict().items() if kept.get(name.partition(".")[0])}
    if new.encoder:
        tensors |= {f"encoder.{name}": t for name, t in new.encoder.state.items()}
    if new.codec:
        tensors |= {f"codec.{name}": t for name, t in new.codec.state.items()}
    if new.llm:
        tables = ("embed_tokens.weight", "lm_head.weight")
        tensors |= {f"body.{name}": t for name, t in new.llm.state.items() if name not in tables}
    return tensors | _tables(old, spec, new.llm, fit, torch.Generator().manual_seed(seed))


def _tables(
    old: OmniModel, spec: OmniSpec, llm: parts.Llm | None, fit: Fit, generator: torch.Generator
) -> dict[str, Tensor]:
    """Embedding and heads: the text rows, then the audio rows."""
    rows = old.embedding.weight.detach()
    words = old.spec.layout.text_vocab
    text, heads = rows[:words], old.text_rows().detach()
    new_text, new_heads = text, heads
    if llm:
        new_text, new_heads = llm.embedding.float(), (llm.embedding if llm.head is None else llm.head).float()
        text = _text_rows(new_text, text, spec.layout, generator)
        heads = text if spec.tied else _text_rows(new_heads, heads, spec.layout, generator)
    audio = _audio_rows(old.spec.layout, spec.layout, rows[words:], new_text, fit, generator)
    tables = {"embedding.weight": torch.cat([text, audio])}
    if not spec.tied:
        tables["text_head.weight"] = heads
    if not spec.tied or spec.tts_layers:
        own = old.audio_rows().detach()
        tables["audio_head.weight"] = _audio_rows(old.spec.layout, spec.layout, own, new_heads, fit, generator)
    return tables


def _text_rows(words: Tensor, old: Tensor, layout: TokenLayout, generator: torch.Generator) -> Tensor:
    """The new LLM's `words` [V, D] and the special tokens: the old ones where their width is the same."""
    count = layout.text_specials
    specials = old[-count:] if old.shape[1] == words.shape[1] else new_rows(words, count, generator)
    return torch.cat([words, specials])


def _audio_rows(
    old: TokenLayout, new: TokenLayout, rows: Tensor, words: Tensor, fit: Fit, generator: torch.Generator
) -> Tensor:
    """Audio rows [K * audio_vocab, D]: the old ones where they fit, else new ones.

    The audio specials of the streams that both have are kept where the width is the same. `words`: text rows of the
    new width, whose statistics are taken where the old rows have another.
    """
    if fit.audio_rows:
        return rows
    count = new.streams * new.audio_vocab
    if not fit.specials:
        return new_rows(words, count, generator)
    fresh = new_rows(rows, count, generator).view(new.streams, new.audio_vocab, -1)
    both = min(old.streams, new.streams)
    fresh[:both, new.codebook_size :] = rows.view(old.streams, old.audio_vocab, -1)[:both, old.codebook_size :]
    return fresh.flatten(0, 1)


def _describe(model: OmniModel, old: OmniModel, given: dict[str, str], new: _Parts, notes: Notes, seed: int) -> None:
    """Tokenizer, provenance and licences of the new model."""
    before: dict[str, Any] = old.provenance
    marks = [str(before.get("source_hash", "")), *(f"{name} {sources.mark(s)}" for name, s in given.items()), str(seed)]
    replaced = ", ".join(f"{name} {sources.short_name(source)}" for name, source in given.items())
    model.provenance = {
        "weights": "random" if notes.stages else "trained",
        "kind": "swapped",
        "untrained": ", ".join(notes.untrained),
        "stages": ", ".join(map(str, notes.stages)),
        "source": f"{before.get('source', 'a checkpoint')}; swapped: {replaced}",
        "swapped_from": str(before.get("source_hash", "")),
        "seed": seed,
        "source_hash": hashlib.sha256("\n".join(marks).encode()).hexdigest(),
    }
    compose.note_graphs(model, given)
    model.licences = {**old.licences, **{name: sources.licence(source) for name, source in given.items()}}
    model.tokenizer_json = old.tokenizer_json
    if new.llm:
        model.tokenizer_json = sources.tokenizer_json(given["llm"])
        compose.note_limit(model, new.llm)
    elif "limit" in before:
        model.provenance["limit"] = before["limit"]
