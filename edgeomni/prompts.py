"""Task -> prompt frames, in the forms of the published model (gpt-omni/mini-omni, inference.py).

    task      audio streams 0..K-1                       text stream
    aa        input_a, pad_a*F, eoa, answer_a            input_t, pad_t*F, eot, answer_t
    at        input_a, pad_a*F, eoa, pad_a               the same
    asr       input_a, pad_a*F, eoa, pad_a               input_t, pad_t*F, eot, asr
    ta        pad_a*(n+2), answer_a                      input_t, ids*n, eot, answer_t
    tt        pad_a*(n+3)                                the same

F encoder features stand at positions 1..F. Two-row aa is the aa row above the at row. A system prompt stands first:
pad_a on the audio streams and its ids on the text stream; earlier turns and the question follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import I32
from .errors import PromptError
from .spec import AUDIO_IN, AUDIO_OUT, TASKS, OmniSpec, TokenLayout
from .text import Tokenizer
from .tokens import audio_constant


@dataclass(frozen=True)
class Prompt:
    """ids int32 [rows, K+1, T] in the joint vocabulary; features go to feature_start.. of every row."""

    ids: I32
    feature_start: int = 1

    @property
    def length(self) -> int:
        return int(self.ids.shape[2])

    @property
    def rows(self) -> int:
        return int(self.ids.shape[0])


def system_ids(spec: OmniSpec, tokenizer: Tokenizer, system: str | None = None) -> list[int]:
    """Text ids of a system prompt within the checkpoint's format; none for a blank text.

    `system` None: the checkpoint's own (`spec.chat.default_system`). Raises CheckpointError where there is a text
    but no tokenizer, PromptError where the tokenizer makes nothing of it.
    """
    text = spec.chat.system(system)
    return tokenizer.encode(text) if text else []


def question_ids(spec: OmniSpec, tokenizer: Tokenizer, text: str) -> list[int]:
    """Text ids of a written question within the checkpoint's format.

    Raises PromptError for a blank question, CheckpointError where the checkpoint has no tokenizer.
    """
    return tokenizer.encode(spec.chat.question(text))


def from_texts(
    spec: OmniSpec,
    tokenizer: Tokenizer,
    task: str,
    *,
    features: int = 0,
    text: str | None = None,
    system: str | None = None,
    two_row: bool = False,
    history: Sequence[tuple[str, str]] = (),
) -> Prompt:
    """The prompt of one turn, as `build` makes it, from texts. Sessions and the trainer both take their prompts here.

    `text`: the question of tt and ta. `system`: see `system_ids`. `history`: earlier turns as (question, answer).
    Raises PromptError as `build` does and for a blank text, CheckpointError where the checkpoint has no tokenizer.
    """
    return build(
        spec,
        task,
        features=features,
        text_ids=[] if text is None else question_ids(spec, tokenizer, text),
        system_ids=system_ids(spec, tokenizer, system),
        two_row=two_row,
        history=[(question_ids(spec, tokenizer, asked), tokenizer.encode(answer)) for asked, answer in history],
    )


def build(
    spec: OmniSpec,
    task: str,
    *,
    features: int = 0,
    text_ids: Sequence[int] = (),
    system_ids: Sequence[int] = (),
    two_row: bool = False,
    history: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
) -> Prompt:
    """The prompt of one turn: `features` encoder features, or `text_ids`, according to `task`.

    `system_ids` are the text ids of the system prompt. `history` holds earlier turns as (question ids, answer ids).
    Raises PromptError for an unknown task or one that the checkpoint was not trained for, ids outside the text
    vocabulary, an empty question, and more history than the checkpoint was trained to see.
    """
    _check(spec, task, features, text_ids, len(history))
    _check_ids(spec.layout, [*text_ids, *system_ids, *(i for turn in history for ids in turn for i in ids)])
    layout = spec.layout
    if task in AUDIO_IN:
        rows = [_audio_question(layout, task, features)]
        if task == "aa" and two_row:
            rows.append(_audio_question(layout, "at", features))
    else:
        rows = [_text_question(layout, task, text_ids)]
    past = [_system(layout, system_ids), *(_past_turn(layout, *turn) for turn in history)]
    start = 1 + sum(p.shape[1] for p in past)
    return Prompt(np.stack([np.concatenate([*past, row], axis=1) for row in rows]), start)


def _check(spec: OmniSpec, task: str, features: int, text_ids: Sequence[int], turns: int) -> None:
    if task not in TASKS:
        raise PromptError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if task not in spec.tasks:
        raise PromptError(f"this checkpoint was not trained for task {task!r}; it knows {', '.join(spec.tasks)}")
    if turns > spec.history_turns:
        raise PromptError(
            f"{turns} turn(s) of history given, but this checkpoint was trained with {spec.history_turns}; "
            "ask each question on its own"
        )
    if task in AUDIO_IN and features < 1:
        raise PromptError(f"task {task!r} needs spoken audio; give a sound file")
    if task not in AUDIO_IN and not len(text_ids):
        raise PromptError(f"task {task!r} needs a question in text; give one that is not empty")


def _check_ids(layout: TokenLayout, ids: Sequence[int]) -> None:
    if bad := [i for i in ids if not 0 <= i < layout.text_vocab]:
        raise PromptError(f"text ids {bad[:5]} lie outside the text vocabulary of {layout.text_vocab} rows")


def _audio_question(layout: TokenLayout, task: str, features: int) -> I32:
    answer = layout.answer_a if task == "aa" else layout.pad_a
    audio = np.concatenate(
        [
            audio_constant(layout, layout.input_a),
            audio_constant(layout, layout.pad_a, features),
            audio_constant(layout, layout.eoa),
            audio_constant(layout, answer),
        ],
        axis=1,
    )
    asked = layout.asr if task == "asr" else layout.answer_t
    return _with_text(audio, [layout.input_t, *[layout.pad_t] * features, layout.eot, asked])


def _text_question(layout: TokenLayout, task: str, ids: Sequence[int]) -> I32:
    audio = audio_constant(layout, layout.pad_a, len(ids) + 3)
    if task in AUDIO_OUT:
        audio[:, -1:] = audio_constant(layout, layout.answer_a)
    return _with_text(audio, [layout.input_t, *ids, layout.eot, layout.answer_t])


def _system(layout: TokenLayout, ids: Sequence[int]) -> I32:
    return _with_text(audio_constant(layout, layout.pad_a, len(ids)), ids)


def _past_turn(layout: TokenLayout, question: Sequence[int], answer: Sequence[int]) -> I32:
    text = [layout.input_t, *question, layout.eot, layout.answer_t, *answer, layout.eot]
    return _with_text(audio_constant(layout, layout.pad_a, len(text)), text)


def _with_text(audio: I32, text: Sequence[int]) -> I32:
    return np.concatenate([audio, np.array([text], np.int32)])
