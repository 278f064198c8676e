"""Quality on real questions: how far the export leaves the original along the answers that the original gives.

A model that has learned something is sure of its own answers, and a wrong scale makes it unsure or turns a choice.
Along sampled frames of a synthetic probe (figures.py) nobody is sure of anything, so that little of that shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import F32, I32
from ..components import Encoder, Features, LanguageModel
from ..errors import EdgeOmniError, GateError
from ..generate import next_ids
from ..interrupt import Interrupt
from ..prefill import prefill
from ..prompts import Prompt
from ..question import Question
from ..spans import Spans
from ..spec import AUDIO_OUT, OmniSpec
from ..text import Tokenizer
from . import metrics

LONGEST = 120
"""Frames of an answer that are compared at most."""


@dataclass(frozen=True)
class Side:
    """One of the two models that are compared."""

    encoder: Encoder
    llm: LanguageModel[Any, Any]


@dataclass
class Logits:
    """What the heads said along one answer: text up to its end, [V] each, and where it speaks audio, [K, V] each."""

    text: list[F32]
    audio: list[F32]


def measure(
    original: Side, exported: Side, spec: OmniSpec, tokenizer: Tokenizer, questions: Sequence[Question]
) -> tuple[dict[str, float], dict[str, Any]]:
    """ "answers.kl" (nats) and "answers.top1" (share) of the worst head, and those of each head.

    Each side hears a question with its own encoder. The original answers it greedily, and the export is fed the same
    ids. Questions that this checkpoint cannot be asked are left out. Raises GateError where none is left.
    """
    pairs = list[tuple[Logits, Logits]]()
    for question in questions:
        try:
            question.check(spec, tokenizer)
            ids, wanted = walk(original, spec, tokenizer, question, None)
        except EdgeOmniError:
            continue
        pairs.append((wanted, walk(exported, spec, tokenizer, question, ids)[1]))
    if not pairs:
        raise GateError("none of the questions that are to judge the export's answers can be asked; give others")
    heads = _heads(pairs)
    figures = {
        "answers.kl": max(head["kl"] for head in heads.values()),
        "answers.top1": min(head["top1"] for head in heads.values()),
    }
    return figures, {"questions": len(pairs), "heads": heads}


def _heads(pairs: Sequence[tuple[Logits, Logits]]) -> dict[str, dict[str, float]]:
    """Head -> its figures over all answers. Heads that never spoke are left out."""
    found = {
        "text": tuple(np.concatenate([np.stack(side.text) for side in sides]) for sides in zip(*pairs, strict=True))
    }
    spoken = [pair for pair in pairs if pair[0].audio]
    if spoken:
        both = [np.concatenate([np.stack(side.audio) for side in sides]) for sides in zip(*spoken, strict=True)]
        found |= {f"audio{k}": (both[0][:, k], both[1][:, k]) for k in range(both[0].shape[1])}
    return {name: {"kl": metrics.kl(a, b), "top1": metrics.top1(a, b)} for name, (a, b) in found.items()}


def walk(
    side: Side, spec: OmniSpec, tokenizer: Tokenizer, question: Question, given: Sequence[I32] | None
) -> tuple[list[I32], Logits]:
    """The greedy answer in one row, or where ids are `given` the way along these; ids [K+1] of each frame, logits.

    Raises what asking the question raises, for one that this checkpoint cannot be asked.
    """
    features = question.features(spec, side.encoder, Spans(), Interrupt())
    prompt = question.prompt(spec, tokenizer, 0 if features is None else len(features))
    heard = [] if features is None else [Features(prompt.feature_start, features)]
    state = side.llm.start(1, min(spec.context, prompt.length + LONGEST))
    hidden = prefill(side.llm, prompt.ids[:1], heard, state)
    return _along(side.llm, spec, question.task in AUDIO_OUT, hidden, state, _room(spec, prompt), given)


def _room(spec: OmniSpec, prompt: Prompt) -> int:
    return max(1, min(LONGEST, spec.context - prompt.length))


def _along(
    llm: LanguageModel[Any, Any],
    spec: OmniSpec,
    speaks: bool,
    hidden: Any,
    state: Any,
    room: int,
    given: Sequence[I32] | None,
) -> tuple[list[I32], Logits]:
    ids, out, ended = list[I32](), Logits([], []), False
    for index in range(room if given is None else len(given)):
        if index:
            frame = ids[-1]
            hidden = llm.forward(next_ids(spec.layout, frame[:-1].astype(np.int64), int(frame[-1]), 1), (), state)
        known = None if given is None else given[index]
        ids.append(_frame(llm, spec, speaks, hidden, ended, known, out))
        ended = ended or ids[-1][-1] == spec.layout.eot
        if (ids[-1][-2] == spec.layout.eoa) if speaks else ended:
            break
    return ids, out


def _frame(
    llm: LanguageModel[Any, Any],
    spec: OmniSpec,
    speaks: bool,
    hidden: Any,
    ended: bool,
    known: I32 | None,
    out: Logits,
) -> I32:
    """Notes what the heads say of one frame, and chooses its ids where they are not `known`."""
    layout = spec.layout
    text, audio = layout.pad_t, np.full(layout.streams, layout.pad_a, np.int64)
    if not ended:
        out.text.append(llm.text_logits(hidden, 0))
        text = int(out.text[-1].argmax())
    if speaks:
        out.audio.append(llm.audio_logits(hidden, 0, None if known is None else known[:-1].astype(np.int64)))
        audio = out.audio[-1].argmax(-1)
    return known if known is not None else np.array([*audio, text], np.int32)
