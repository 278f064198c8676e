"""The words that presets know: some hundred made-up ones, or those of given texts, and the tokenizer of either."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import product

from tokenizers import normalizers, pre_tokenizers

_ROWS_MULTIPLE = 64
UNKNOWN = "<unk>"

_WORDS = (
    "<unk> . , ? ! the of and to in is you that it he was for on are with as his they at be this from have or by "
    "one had not but what all were when we there can an your which their said if do will each about how up out "
    "them then she many some so these would other into has more her two like him see time could no make than "
    "first been its who now people my made over did down only way find use may water long little very after words "
    "called just where most know get through back much before go good new write our used me man too any day same "
    "right look think also around another came come work three word must because does part even place well such "
    "here take why things help put years different away again off went old number great tell men say small every"
)
_ONSETS = (*"bdfghklmnprstvwz", "ch", "sh", "th", "br", "dr", "gr", "kr", "pl", "st", "tr")
_NUCLEI = (*"aeiou", "ai", "ea", "oo")
_CODAS = ("", *"nrlstmk")


def split_words(text: str) -> list[str]:
    """The words and signs of a text in lower case, exactly as the presets' tokenizer splits it."""
    lower = normalizers.Lowercase().normalize_str(text)
    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(lower)]


def vocabulary_of(words: Iterable[str]) -> list[str]:
    """The vocabulary of `words`, or of whole texts: "<unk>", then each word of theirs once, in the order in which they
    come, as `split_words` has them, then unused entries up to a multiple of 64.
    """
    known = list(dict.fromkeys([UNKNOWN, *(part for word in words for part in split_words(word))]))
    return known + [f"<unused{i}>" for i in range(-len(known) % _ROWS_MULTIPLE)]


def made_up(words: int) -> list[str]:
    """So many printable words in lower case: common English ones first, then syllables; never one twice."""
    vocab = dict.fromkeys(_WORDS.split())
    syllables = ["".join(parts) for parts in product(_ONSETS, _NUCLEI, _CODAS)]
    count = len(syllables)
    for i in range(count * count):  # both strides have no divisor in common with `count`, so no pair comes twice
        if len(vocab) >= words:
            break
        vocab.setdefault(syllables[37 * i % count] + syllables[(53 * i + i // count) % count])
    return list(vocab)[:words]


def tokenizer_of(vocabulary: Sequence[str]) -> str:
    """tokenizer.json of words by their place in `vocabulary`; others are "<unk>"."""
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": {"type": "Lowercase"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {w: i for i, w in enumerate(vocabulary)},
                "unk_token": UNKNOWN,
            },
        }
    )
