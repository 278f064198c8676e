"""What typed documents cannot say of a recipe: which of its parts need one another, and which exclude one another."""

from __future__ import annotations

import re

from ..errors import DataError
from ..schema import Source
from .espeak import PITCHES, RATES_WPM
from .recipe import LANGUAGE, TEXT_COLUMNS, TRAIN, Range, Recipe, Recording, Topic
from .slots import Formula, slots_of

_SPLIT_NAME = re.compile(r"[a-z][a-z0-9-]{0,40}\Z")
_MOST_SECONDS = 10.0


def check_fit(recipe: Recipe, source: Source) -> None:
    """Raises the source's error, with the path of the key, where parts of the recipe do not fit together."""
    _check_splits(recipe, source)
    _check_voices(recipe, source)
    for path, recording in _recordings(recipe):
        _check_recording(recording, path, source)
    for index, topic in enumerate(recipe.topics):
        _check_topic(topic, recipe, f"$.topics[{index}]", source)
    if len({topic.name for topic in recipe.topics}) < len(recipe.topics):
        raise source.fault("two topics have the same name", "$.topics")


def _check_splits(recipe: Recipe, source: Source) -> None:
    if TRAIN not in recipe.splits or recipe.splits[TRAIN].new:
        raise source.fault('there must be a split "train", and nothing in it is new', "$.splits")
    has = {
        "voices": bool(recipe.question_voice.unseen),
        "wordings": any(topic.unseen_questions for topic in recipe.topics),
        "arguments": any(topic.unseen_arguments for topic in recipe.topics),
    }
    for name, split in recipe.splits.items():
        path = f"$.splits.{name}"
        if not _SPLIT_NAME.match(name):
            raise source.fault("a split's name has small letters, digits and dashes alone", path)
        if name != TRAIN and (not split.new or len(set(split.new)) < len(split.new)):
            raise source.fault("must name what is new in it, each once: voices, wordings, arguments", f"{path}.new")
        if missing := [kind for kind in split.new if not has[kind]]:
            raise source.fault(f"nothing in the recipe holds out {missing[0]}", f"{path}.new")


def _check_voices(recipe: Recipe, source: Source) -> None:
    asking, answer = recipe.question_voice, recipe.answer_voice
    spans = {"rate_wpm": RATES_WPM, "pitch": PITCHES, "pitch_range": PITCHES}
    for name, limits in spans.items():
        _check_range(getattr(asking, name), limits, f"$.question_voice.{name}", source)
        fixed = getattr(answer, name)
        _check_range((fixed, fixed), limits, f"$.answer_voice.{name}", source)
    for name in ("rate_wpm", "pitch"):
        seen, unseen = getattr(asking, name), getattr(asking, f"unseen_{name}")
        if unseen is not None:
            path = f"$.question_voice.unseen_{name}"
            _check_range(unseen, spans[name], path, source)
            if unseen[0] <= seen[1] and seen[0] <= unseen[1]:
                raise source.fault(f"overlaps {name}, so it would not be unseen", path)
    for name in ("before_s", "after_s"):
        silence = getattr(answer, name)
        _check_range((silence, silence), (0, _MOST_SECONDS), f"$.answer_voice.{name}", source)
    for key in ("voices", "unseen", "never"):
        for index, voice in enumerate(getattr(asking, key)):
            _check_slots(voice, {LANGUAGE}, f"$.question_voice.{key}[{index}]", source)
    _check_slots(answer.voice, {LANGUAGE}, "$.answer_voice.voice", source)


def _recordings(recipe: Recipe) -> list[tuple[str, Recording]]:
    own = [(f"$.splits.{name}.recording", split.recording) for name, split in recipe.splits.items()]
    return [("$.recording", recipe.recording), *((path, recording) for path, recording in own if recording)]


def _check_recording(recording: Recording, path: str, source: Source) -> None:
    _check_range(recording.before_s, (0, _MOST_SECONDS), f"{path}.before_s", source)
    _check_range(recording.after_s, (0, _MOST_SECONDS), f"{path}.after_s", source)
    _check_range(recording.gain_db, (-60, 20), f"{path}.gain_db", source)
    _check_range(recording.snr_db, (-20, 100), f"{path}.snr_db", source)


def _check_range(span: Range, limits: Range, path: str, source: Source) -> None:
    if not limits[0] <= span[0] <= span[1] <= limits[1]:
        raise source.fault(
            f"{list(span)} must be a range, lower end first, within {limits[0]:g} to {limits[1]:g}", path
        )


def _check_topic(topic: Topic, recipe: Recipe, path: str, source: Source) -> None:
    ways = [bool(topic.each), bool(topic.columns or topic.rows), topic.from_text]
    if sum(ways) > 1:
        raise source.fault("takes its words from one of these alone: each, rows, from_text", path)
    if (topic.where or topic.then) and not topic.each:
        raise source.fault("where and then need each", path)
    if topic.unseen_arguments and not any(ways):
        raise source.fault("there are no arguments to hold out", f"{path}.unseen_arguments")
    if bool(topic.columns) != bool(topic.rows):
        raise source.fault("columns and rows need one another", path)
    for index, row in enumerate(topic.rows):
        if len(row) != len(topic.columns):
            raise source.fault(f"has {len(row)} words for {len(topic.columns)} columns", f"{path}.rows[{index}]")
    if unknown := [name for name in topic.each.values() if name not in recipe.lists]:
        raise source.fault(f"there is no list {unknown[0]!r}", f"{path}.each")
    _check_templates(topic, path, source)


def _check_templates(topic: Topic, path: str, source: Source) -> None:
    """Refuses templates and formulas that cannot be read, and slots that nothing fills."""
    names = {*topic.each, *topic.then, *topic.columns, *(TEXT_COLUMNS if topic.from_text else ())}
    if len(names) < len(topic.each) + len(topic.then) + len(topic.columns):
        raise source.fault("two arguments, words or columns have the same name", path)
    for key in ("questions", "unseen_questions"):
        for index, template in enumerate(getattr(topic, key)):
            _check_slots(template, names, f"{path}.{key}[{index}]", source)
    _check_slots(topic.answer, names, f"{path}.answer", source)
    for at, text in {f"{path}.where": topic.where, **{f"{path}.then.{k}": v for k, v in topic.then.items()}}.items():
        try:
            Formula.parse(text or "1")
        except DataError as exc:
            raise source.fault(str(exc), at) from exc


def _check_slots(template: str, names: set[str], path: str, source: Source) -> None:
    try:
        unfilled = [name for name in slots_of(template) if name not in names]
    except DataError as exc:
        raise source.fault(str(exc), path) from exc
    if unfilled:
        raise source.fault(f"nothing fills the slot {{{unfilled[0]}}} of {template!r}", path)
