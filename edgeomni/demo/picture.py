"""The demo's picture: the question and the answer as spectrograms on one time axis, with the words under them."""

from __future__ import annotations

import os
import textwrap
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import F32

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_PX, HEIGHT_PX = 1600, 600
"""Twice as fine as most pages show it, so that it stays sharp on dense screens."""
_DPI = 160
_WINDOW_S, _STEP_S = 0.032, 0.004
_RANGE_DB = 60.0
"""What lies further below the loudest point is drawn as silence."""
_HIGHEST_HZ = 7500
_TICKS_HZ = (250, 500, 1000, 2000, 4000)
_QUESTION, _ANSWER = ("Blues", "#1f5a94"), ("Oranges", "#a34a00")
"""Colour maps from white to dark, and the colour of words. Blue and orange are told apart by all kinds of sight."""
_INK, _GREY = "#222222", "#666666"
_LEAST_S = 1.2
"""Room that a part has on the axis at least, so that its words can stand under it."""
_LINES = 2
_TEXT_PT = 11.5
_CHARACTER_PX = 17.5
"""A little more than the mean width of a bold character of `_TEXT_PT`, for breaking lines."""


@dataclass(frozen=True, eq=False)
class Part:
    """A stretch of speech: samples float32 [S] at `rate` Hz, and the words that stand under it."""

    samples: F32
    rate: int
    words: str

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def draw(path: str | os.PathLike[str], question: Part, answer: Part, first_audio_s: float | None, title: str) -> None:
    """Writes a PNG of WIDTH_PX x HEIGHT_PX pixels; an existing file is replaced.

    The answer begins `first_audio_s` seconds after the question's end, as it would be played (None: nothing was said).
    Powers are in dB below each part's own loudest point, frequencies on the mel scale of O'Shaughnessy (1987):
    2595 log10(1 + Hz / 700). Raises ModuleNotFoundError where matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_PX / _DPI, HEIGHT_PX / _DPI), dpi=_DPI, facecolor="white")
    axes = figure.add_axes((0.065, 0.36, 0.915, 0.46))
    start = question.seconds + (first_audio_s or 0.0)
    end = start + (max(answer.seconds, _LEAST_S) if first_audio_s is not None else 0.0)
    _spectrogram(axes, question, 0.0, _QUESTION[0])
    if first_audio_s is not None:
        _spectrogram(axes, answer, start, _ANSWER[0])
        _mark(axes, question.seconds, start, first_audio_s)
    _scales(axes, end)
    _words(axes, question, 0.0, "it hears", _QUESTION[1], until=question.seconds)
    _words(axes, answer, start, "it answers", _ANSWER[1], until=end)
    figure.text(0.065, 0.94, title, fontsize=13, color=_INK, weight="bold", va="center", parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a character that the font lacks becomes a box
        figure.savefig(path, format="png", metadata={"Software": None})


def levels_db(samples: F32, rate: int) -> tuple[F32, F32, F32]:
    """Power below the loudest point [frequencies, columns] in dB, at least -60, with Hz and seconds of its edges.

    A Hann window of 32 ms at every 4 ms; sound shorter than a window is filled up with silence.
    """
    window, step = round(_WINDOW_S * rate), round(_STEP_S * rate)
    padded = np.pad(samples, (window // 2, window // 2 + max(0, window - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::step] * np.hanning(window)
    power = np.square(np.abs(np.fft.rfft(frames, 2 * window))).T
    db = 10 * np.log10(np.maximum(power / max(float(power.max()), 1e-12), 10 ** (-_RANGE_DB / 10)))
    hz = (np.arange(len(power) + 1) - 0.5) * rate / (2 * window)
    seconds = (np.arange(power.shape[1] + 1) - 0.5) * step / rate
    return np.asarray(db, np.float32), np.asarray(np.maximum(hz, 0), np.float32), np.asarray(seconds, np.float32)


def _spectrogram(axes: Axes, part: Part, start: float, colours: str) -> None:
    db, hz, seconds = levels_db(part.samples, part.rate)
    seconds = np.clip(seconds, 0, part.seconds) + start
    axes.pcolormesh(seconds, hz, db, cmap=colours, vmin=-_RANGE_DB, vmax=0, rasterized=True)


def _mark(axes: Axes, asked: float, start: float, first_audio_s: float) -> None:
    """Lines at the question's end and at the first audio, and the milliseconds between them."""
    for x, style in ((asked, ":"), (start, "-")):
        axes.axvline(x, color=_INK, linewidth=1.3, linestyle=style, clip_on=False, ymax=1.06)
    label = f"first audio {1000 * first_audio_s:.0f} ms after the question"
    axes.annotate(
        label,
        ((asked + start) / 2, 1.06),
        xycoords=("data", "axes fraction"),
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        fontsize=10,
        color=_INK,
    )


def _scales(axes: Axes, end: float) -> None:
    axes.set_yscale("function", functions=(_mel, _hertz))
    axes.set_ylim(0, _HIGHEST_HZ)
    axes.set_yticks(_TICKS_HZ, [f"{hz / 1000:g}" for hz in _TICKS_HZ])
    axes.minorticks_off()
    axes.set_xlim(0, end)
    axes.set_ylabel("kHz", color=_GREY, fontsize=10)
    axes.set_xlabel("seconds", color=_GREY, fontsize=10, loc="right", labelpad=2)
    axes.tick_params(colors=_GREY, labelsize=9.5, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#bbbbbb")


def _words(axes: Axes, part: Part, start: float, what: str, colour: str, until: float) -> None:
    """What is heard or said, under its part of the axis, broken to its width."""
    left, right = (axes.transData.transform((x, 0))[0] for x in (start, until))
    room = max(8, int((right - left) / _CHARACTER_PX))
    lines = textwrap.wrap(" ".join(part.words.split()), room, max_lines=_LINES, placeholder=" …") or ["(nothing)"]
    place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "top", "parse_math": False}
    axes.text(start, -0.31, what, fontsize=9.5, color=_GREY, **place)
    axes.text(start, -0.42, "\n".join(lines), fontsize=_TEXT_PT, color=colour, weight="bold", **place)


def _mel(hz: Any) -> Any:
    return 2595 * np.log10(1 + np.asarray(hz) / 700)


def _hertz(mel: Any) -> Any:
    return 700 * (10 ** (np.asarray(mel) / 2595) - 1)
