"""The question's options, as spelled on the command line, turned into what the library takes."""

from __future__ import annotations

from typing import Any, Literal

from ..errors import UsageError
from ..sampling import Sampling
from ..spec import AUDIO_IN, AUDIO_OUT, Task

MAX_SECONDS = 30.0
"""Sound of an answer, unless asked otherwise: a model that does not end its answer would fill its whole context."""


def task_of(task: Task | None, audio: str | None, text: str | None) -> Task:
    """The task asked for, or the one that the question implies. Raises UsageError where they do not fit."""
    task = task or ("ta" if text is not None and audio is None else "aa")
    if task in AUDIO_IN:
        if audio is None:
            raise UsageError(f"task {task} answers a spoken question: give a sound file")
        if text is not None:
            raise UsageError(f"task {task} takes a sound file, not --text; tt and ta take text")
    else:
        if text is None:
            raise UsageError(f'task {task} answers a written question: give --text "..."')
        if audio is not None:
            raise UsageError(f"task {task} takes --text, not a sound file; aa, at and asr take sound")
    return task


def max_seconds_of(task: Task, asked: float | None) -> float | None:
    """Seconds of sound that the answer may have; None for tasks without sound. Raises UsageError."""
    if task in AUDIO_OUT:
        return MAX_SECONDS if asked is None else asked
    if asked is not None:
        raise UsageError(f"--max-seconds bounds sound, and task {task} answers in text; use --max-length")
    return None


def sampling_of(how: dict[str, Any]) -> Sampling:
    """Only what was given is set. Asking for a temperature or top-p alone means sampling, so top-k 1 is lifted."""
    keys = ("greedy", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    given = {k: how[k] for k in keys if how[k] is not None}
    if how["top_k"] is None and (how["temperature"] is not None or how["top_p"] is not None):
        given["top_k"] = 0
    return Sampling(**given)


def window_of(text: str | None) -> float | Literal["auto"] | None:
    """`--encoder-window`: auto, or seconds."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--encoder-window takes auto or seconds, not {text!r}") from None
