"""How long a text takes to say, at the least: a text that its recording has no time for belongs to another one."""

from __future__ import annotations

import unicodedata

CHARS_PER_S = 30.0
"""Most characters per second that a text may need of its recording. Quick speech has about 20 letters per second."""
_SYLLABLE = 3
"""A sign that is read as a syllable or as a word takes about as long as three letters."""
_SYLLABIC = ("CJK", "HANGUL", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI SYLLABLE")
"""How the Unicode names of signs that stand for a syllable or more begin."""


def spoken_length(text: str) -> int:
    """Letters that are said: a letter of an alphabet counts 1, a digit, an ideograph or a syllable sign counts 3.

    Blanks, punctuation and accents are not said and count nothing.
    """
    return sum(_weight(sign) for sign in text)


def _weight(sign: str) -> int:
    kind = unicodedata.category(sign)[0]
    if kind not in "LN":
        return 0
    return _SYLLABLE if kind == "N" or unicodedata.name(sign, "").startswith(_SYLLABIC) else 1
