"""The demo's picture, looked at pixel by pixel: what is drawn where."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from edgeomni.demo.picture import HEIGHT_PX, WIDTH_PX, Part, draw, levels_db

RATE = 16_000
LEFT, WIDTH = 0.065 * WIDTH_PX, 0.915 * WIDTH_PX
"""Where the time axis lies, in pixels."""


def noise(seconds: float, rate: int = RATE, words: str = "hello") -> Part:
    samples = np.random.default_rng(0).normal(0, 0.1, round(seconds * rate)).astype(np.float32)
    return Part(samples, rate, words)


def columns(path: Path, colour: str) -> Any:
    """Columns in which most points of the spectrograms' height are clearly of that colour."""
    pixels = imread(path)[:, :, :3]
    red, blue = pixels[150:330, :, 0], pixels[150:330, :, 2]
    clear = red - blue if colour == "orange" else blue - red
    return np.flatnonzero((clear > 0.2).mean(0) > 0.5)


def test_parts_stand_where_they_are_heard(tmp_path: Path) -> None:
    """A question of 1 s; after 0.5 s an answer of 1.5 s at another rate: three seconds on the axis."""
    path = tmp_path / "p.png"
    draw(path, noise(1.0), noise(1.5, 24_000), 0.5, "title")
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (WIDTH_PX, HEIGHT_PX) == (1600, 600)
    blue, orange = columns(path, "blue"), columns(path, "orange")
    assert [blue[0], blue[-1]] == pytest.approx([LEFT, LEFT + WIDTH / 3], abs=4)
    assert [orange[0], orange[-1]] == pytest.approx([LEFT + WIDTH / 2, LEFT + WIDTH], abs=4)
    assert len(blue) > 0.98 * WIDTH / 3 and len(orange) > 0.98 * WIDTH / 2


def test_a_short_answer_keeps_room_for_its_words(tmp_path: Path) -> None:
    draw(tmp_path / "p.png", noise(1.8), noise(0.3), 0.0, "title")
    orange = columns(tmp_path / "p.png", "orange")
    assert [orange[0], orange[-1]] == pytest.approx([LEFT + WIDTH * 1.8 / 3, LEFT + WIDTH * 2.1 / 3], abs=4)


def test_without_sound_the_question_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    draw(path, noise(1.0), Part(np.zeros(0, np.float32), RATE, ""), None, "title")
    assert columns(path, "blue")[-1] == pytest.approx(LEFT + WIDTH, abs=4) and len(columns(path, "orange")) == 0


def test_words_are_drawn_whatever_they_are(tmp_path: Path) -> None:
    """Mathematical markup, characters that the font lacks and endless words neither fail nor leave the picture."""
    files = []
    for name, words in (("a", "one"), ("b", "$x^2 is \\frac{$"), ("c", "你好 𒀀"), ("d", "endless " * 200)):
        files.append(tmp_path / f"{name}.png")
        draw(files[-1], noise(1.0), noise(1.5, words=words), 0.1, "title")
    below = [imread(path)[500:, :, :3] for path in files]
    assert all((text < 0.5).any() for text in below) and not np.array_equal(below[0], below[1])
    margins = [np.concatenate([text[:, :90].ravel(), text[-4:].ravel()]) for text in below]
    assert all((margin == 1).all() for margin in margins)


def test_levels_are_decibels_below_the_loudest() -> None:
    """A tone of 1 kHz for half a second, then one of 3 kHz at a tenth of its amplitude, then silence."""
    t = np.arange(RATE // 2) / RATE
    tones = [np.sin(2 * np.pi * 1000 * t), 0.1 * np.sin(2 * np.pi * 3000 * t), np.zeros_like(t)]
    db, hz, seconds = levels_db(np.concatenate(tones).astype(np.float32), RATE)
    assert db.shape == (len(hz) - 1, len(seconds) - 1)
    assert db.max() == 0 and db.min() == -60
    for when, tone, level in ((0.25, 1000, 0.0), (0.75, 3000, -20.0)):
        column = db[:, np.searchsorted(seconds, when) - 1]
        loudest = int(column.argmax())
        assert hz[loudest] <= tone <= hz[loudest + 1] and column[loudest] == pytest.approx(level, abs=0.1)
    assert (db[:, np.searchsorted(seconds, 1.25)] == -60).all()


@pytest.mark.parametrize("count", [1, 100])
def test_sound_shorter_than_a_window_and_silence(count: int) -> None:
    db, _, seconds = levels_db(np.zeros(count, np.float32), RATE)
    assert (db == -60).all() and len(seconds) >= 2
