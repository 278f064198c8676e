"""Scores of one answer, and what pools them: every figure is a sum of counts over a sum of sizes.

Word and character errors are counted by `jiwer` (minimal edits by Levenshtein's distance). Texts are compared as
`normalised` writes them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import NamedTuple

from ..errors import EngineError
from ..install_hint import install_command

ERRORS = ("wer", "cer")
"""Figures of which less is better; of all others more is."""
_APOSTROPHES = str.maketrans("", "", "'’‘`´ʼ")
_UNSPACED = re.compile(
    r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
)
"""Characters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters."""


class Share(NamedTuple):
    """`got` of `of`: an answer right (1 of 1), an F1 (0.8 of 1), word errors of the reference's words (2 of 7)."""

    got: float
    of: float


def less_is_better(name: str) -> bool:
    """Whether `name` ("wer", "heard_cer") counts errors."""
    return name.rpartition("_")[2] in ERRORS


def normalised(text: str) -> str:
    """Lower case, no punctuation, single spaces.

    Apostrophes go without a trace ("don't" is "dont"); every other character of Unicode's punctuation classes becomes a
    space ("twenty-one" is "twenty one"). Compatibility forms are made one (NFKC: full-width letters are plain ones).
    Accents, digits and symbols ("+", "$") stay.
    """
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower()
    return " ".join("".join(" " if unicodedata.category(c).startswith("P") else c for c in text).split())


def tokens(text: str) -> list[str]:
    """Words of the normalised text; characters of scripts without spaces are words of their own."""
    return _UNSPACED.sub(r" \1 ", normalised(text)).split()


def exact(reference: str, text: str) -> Share:
    """1 of 1 where both texts are the same, normalised."""
    return Share(float(normalised(reference) == normalised(text)), 1.0)


def f1(reference: str, text: str) -> Share:
    """F1 of the tokens that both texts share, each as often as both hold it (SQuAD, arXiv 1606.05250)."""
    wanted, given = Counter(tokens(reference)), Counter(tokens(text))
    common = sum((wanted & given).values())
    return Share(2 * common / max(1, sum(wanted.values()) + sum(given.values())), 1.0)


def wer(reference: str, text: str) -> Share:
    """Substituted, deleted and inserted words, of the reference's words."""
    import jiwer

    out = jiwer.process_words(normalised(reference), normalised(text))
    return Share(out.substitutions + out.deletions + out.insertions, out.hits + out.substitutions + out.deletions)


def cer(reference: str, text: str) -> Share:
    """The same in characters, spaces left out, so that it does not matter where a language puts them."""
    import jiwer

    a, b = ("".join(normalised(t).split()) for t in (reference, text))
    out = jiwer.process_characters(a, b)
    return Share(out.substitutions + out.deletions + out.insertions, out.hits + out.substitutions + out.deletions)


def written(task: str, reference: str, text: str) -> dict[str, Share]:
    """What is measured of a written answer: errors of a transcript, else whether the answer is right."""
    if task == "asr":
        return {"wer": wer(reference, text), "cer": cer(reference, text)}
    return {"exact": exact(reference, text), "f1": f1(reference, text)}


def spoken(kind: str, reference: str, heard: str) -> dict[str, Share]:
    """What is measured of a hearing. `kind`: "heard" (the model), "ceiling" (the recording), "floor" (shuffled)."""
    return {f"{kind}_{measure.__name__}": measure(reference, heard) for measure in (exact, wer, cer)}


def pooled(shares: Iterable[Mapping[str, Share]]) -> dict[str, Share]:
    """Name -> the sums over all samples that have it; their quotient is the figure."""
    out: dict[str, Share] = {}
    for scores in shares:
        for name, share in scores.items():
            before = out.get(name, Share(0, 0))
            out[name] = Share(before.got + share.got, before.of + share.of)
    return out


def check_jiwer() -> None:
    """Raises EngineError, with what to install, where `jiwer` is not there."""
    if find_spec("jiwer") is None:
        raise EngineError(
            f"word and character errors are counted by jiwer, which is not installed: {install_command('evaluate')}"
        )
