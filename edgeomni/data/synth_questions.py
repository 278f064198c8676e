"""A recipe written out: every question that it can ask, with its answer, and what of it is held out."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

from ..errors import DataError
from ..schema import Source, read_bytes
from .espeak import check_text
from .recipe import TEXT_COLUMNS, Recipe, Topic
from .slots import Formula, fill

MOST_QUESTIONS = 2_000_000
"""What a recipe may be written out to."""
_log = logging.getLogger("edgeomni")

Arguments = tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """`wording`: the template with its opening. `arguments`: what tells the question from others of its wording, sorted
    where their order does not matter for holding out.

    `new_wording`, `new_arguments`: held out, so never in the split "train".
    """

    topic: str
    wording: str
    arguments: Arguments
    text: str
    answer: str
    new_wording: bool
    new_arguments: bool


def written_out(recipe: Recipe, lines: Sequence[Arguments] = ()) -> list[Question]:
    """Every question of the recipe. `lines`: (question, answer) of the --text file, for topics that take from it.

    Raises DataError where a topic has nothing to ask or too few arguments to hold some out, where a question has two
    different answers, and where one that is held out is the same text as one that is not.
    """
    found: list[Question] = []
    for topic in recipe.topics:
        found += _of_topic(topic, recipe, lines, MOST_QUESTIONS - len(found))
    _check_texts(found, recipe.name)
    return found


def _check_texts(found: Sequence[Question], name: str) -> None:
    first: dict[str, Question] = {}
    for question in found:
        other = first.setdefault(" ".join(question.text.casefold().split()), question)
        if other.answer != question.answer:
            raise DataError(
                f"recipe {name}: {question.text!r} has two answers, {other.answer!r} (topic {other.topic}) and "
                f"{question.answer!r} (topic {question.topic}); change one of the wordings"
            )
        if (other.new_wording, other.new_arguments) != (question.new_wording, question.new_arguments):
            raise DataError(
                f"recipe {name}: {question.text!r} is held out (topic {question.topic}) and is not "
                f"(topic {other.topic}); change one of the wordings"
            )


def read_lines(path: str | os.PathLike[str]) -> list[Arguments]:
    """(question, answer) of a text file: a sentence to a line, or a question and its answer with a tab between.

    A sentence alone is its own answer. Empty lines are left out, and so are lines that repeat another, with a warning.
    Raises DataError that names the line for what cannot be spoken.
    """
    name = os.fspath(path)
    raw = read_bytes(Path(path), Source(name, DataError, "check the path"))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DataError(f"{name}: is not UTF-8 (byte {exc.start}); save it as UTF-8") from exc
    found = [_columns(line, f"{name}:{number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not found:
        raise DataError(f"{name}: has no text; write one sentence to a line")
    once = list(dict.fromkeys(found))
    if len(once) < len(found):
        _log.warning("%s: %d line(s) repeat another and are used once", name, len(found) - len(once))
    return once


def _columns(line: str, where: str) -> Arguments:
    columns = tuple(part.strip() for part in line.split("\t"))
    if len(columns) > len(TEXT_COLUMNS):
        raise DataError(f"{where}: has {len(columns)} columns; give a sentence, or question and answer with one tab")
    for column in columns:
        try:
            check_text(column)
        except DataError as exc:
            raise DataError(f"{where}: {exc}") from exc
    return columns if len(columns) == len(TEXT_COLUMNS) else columns * len(TEXT_COLUMNS)


def _of_topic(topic: Topic, recipe: Recipe, lines: Sequence[Arguments], most: int) -> Iterator[Question]:
    """The topic's questions, wording by wording."""
    where = f"recipe {recipe.name}, topic {topic.name}"
    filled = list(_fillings(topic, recipe, lines, where))
    if not filled:
        raise DataError(f"{where}: nothing is left to ask; look at its where, rows or --text")
    templates = [(text, False) for text in topic.questions] + [(text, True) for text in topic.unseen_questions]
    if (count := len(filled) * len(templates) * len(recipe.openings)) > most:
        raise DataError(f"{where}: {count} questions more are too many; {MOST_QUESTIONS} are allowed in all")
    held = _held_out({_together(arguments, topic) for arguments, _ in filled}, topic, where)
    for (template, new), opening in product(templates, recipe.openings):
        wording = " ".join(part for part in (opening.strip(), template) if part)
        for arguments, words in filled:
            text, answer = fill(wording, words), fill(topic.answer, words)
            group = _together(arguments, topic)
            yield Question(topic.name, wording, group, text, answer, new, group in held)


def _fillings(
    topic: Topic, recipe: Recipe, lines: Sequence[Arguments], where: str
) -> Iterator[tuple[Arguments, Mapping[str, str]]]:
    """What fills the topic's slots, one question after another: its arguments, and the word of every slot."""
    if topic.each:
        yield from _combinations(topic, recipe, where)
    elif topic.from_text or topic.rows:
        columns = TEXT_COLUMNS if topic.from_text else topic.columns
        for row in dict.fromkeys(tuple(row) for row in (lines if topic.from_text else topic.rows)):
            yield row, dict(zip(columns, row, strict=True))
    else:
        yield (), {}


def _combinations(topic: Topic, recipe: Recipe, where: str) -> Iterator[tuple[Arguments, Mapping[str, str]]]:
    lists = {name: recipe.lists[list_] for name, list_ in topic.each.items()}
    allowed = Formula.parse(topic.where or "1")
    formulas = {name: Formula.parse(text) for name, text in topic.then.items()}
    if (count := prod(len(words) for words in lists.values())) > MOST_QUESTIONS:
        raise DataError(f"{where}: its arguments have {count} combinations; {MOST_QUESTIONS} are allowed")
    for indices in product(*(range(len(words)) for words in lists.values())):
        numbers = dict(zip(lists, indices, strict=True))
        try:
            if not allowed.value(numbers, recipe.lists):
                continue
            worked_out = {name: str(formula.value(numbers, recipe.lists)) for name, formula in formulas.items()}
        except DataError as exc:
            raise DataError(f"{where}: {exc}") from exc
        words = {name: lists[name][index] for name, index in numbers.items()}
        yield tuple(words.values()), {**words, **worked_out}


def _together(arguments: Arguments, topic: Topic) -> Arguments:
    """What stands for all arguments that are held out together."""
    return tuple(sorted(arguments)) if topic.unordered else arguments


def _held_out(groups: set[Arguments], topic: Topic, where: str) -> set[Arguments]:
    """Every n-th, in an order that depends on the arguments alone: neither on the seed nor on their order in the file.

    So data made again with another seed holds out the same.
    """
    if topic.unseen_arguments is None:
        return set()
    if len(groups) < 2:
        raise DataError(f"{where}: unseen_arguments needs two arguments or more, one for training and one held out")
    ranked = sorted(groups, key=lambda group: (zlib.crc32("\0".join((topic.name, *group)).encode()), group))
    return set(ranked[topic.unseen_arguments - 1 :: topic.unseen_arguments] or ranked[-1:])
