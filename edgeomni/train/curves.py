"""Pictures of training runs: what RUN/log.jsonl holds, over the steps, as a PNG."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..errors import TrainError
from ..outputs import write_file
from ..spec import TASKS

Log = Sequence[Mapping[str, Any]]
"""The lines of a run's log, as run_log.read gives them."""
EVAL = "eval_"
"""What transformers puts before the names of figures on validation data."""
LOSS_AXIS = "loss (nats per label)"
_SIZE_INCHES, _DPI = (6.4, 4.0), 110
_FEW = 40
"""Points up to which each is marked, so that a single one can be seen."""
_WIDE = 20
"""Largest loss over smallest, from which on the axis is logarithmic."""


def draw_curves(log: Log, out: str | os.PathLike[str]) -> None:
    """Writes the PNG of one run, replacing an earlier one: its losses, those of streams and of tasks, its rate.

    What the log does not hold has no panel. Raises TrainError for a log without a loss, UsageError as write_file does.
    """
    if not series(log, "loss")[0] and not series(log, EVAL + "loss")[0]:
        raise TrainError("the log holds no loss, so there is nothing to draw; train for more steps, or log more often")
    streams = sorted(
        {name for line in log for name in line if re.fullmatch(r"loss_(text|ctc|audio\d+)", name)}, key=_natural
    )
    tasks = [f"loss_{task}" for task in TASKS if any(f"loss_{task}" in line for line in log)]
    panels = [("Loss", ["loss"]), ("Loss by stream", streams), ("Loss by task", tasks)]
    shown = [(title, names) for title, names in panels if names]
    rate = series(log, "learning_rate")
    figure, axes = _panels(len(shown) + bool(rate[0]))
    for axis, (title, names) in zip(axes, shown, strict=False):
        _losses(axis, title, log, names)
    if rate[0]:
        _rate(axes[-1], {"": log})
    _write(figure, out)


def draw_comparison(runs: Mapping[str, Log], out: str | os.PathLike[str], force: bool = True) -> None:
    """Writes the PNG of several runs by name: training loss, validation loss where there is one, learning rate.

    Raises TrainError where no run has a loss, UsageError as write_file does.
    """
    if not any(series(log, "loss")[0] for log in runs.values()):
        raise TrainError("none of the runs has logged a loss, so there is nothing to draw; train them for more steps")
    figures = [("Training loss", "loss"), ("Validation loss", EVAL + "loss")]
    shown = [(title, name) for title, name in figures if any(series(log, name)[0] for log in runs.values())]
    rates = any(series(log, "learning_rate")[0] for log in runs.values())
    figure, axes = _panels(len(shown) + rates)
    for axis, (title, name) in zip(axes, shown, strict=False):
        _runs(axis, runs, name)
        _finish(axis, title, LOSS_AXIS)
    if rates:
        _rate(axes[-1], runs)
    _write(figure, out, force)


def series(log: Log, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one figure, where the log has it; null becomes NaN, a gap in the curve."""
    lines = [line for line in log if name in line]
    return [line["step"] for line in lines], [float("nan") if line[name] is None else line[name] for line in lines]


def _losses(axis: Axes, title: str, log: Log, names: Sequence[str]) -> None:
    """Each figure on training data as a line, and on validation data dashed, in the same colour."""
    for name, colour in zip(names, _colours(names), strict=True):
        trained, validated = series(log, name), series(log, EVAL + name)
        said = ("training", "validation") if name == "loss" else (name.removeprefix("loss_"), "")
        _line(axis, trained, said[0], color=colour)
        _line(axis, validated, said[1], color=colour, linestyle="--")
    dashed = any(series(log, EVAL + name)[0] for name in names)
    _finish(axis, f"{title} (dashed: validation)" if dashed else title, LOSS_AXIS)


def _runs(axis: Axes, runs: Mapping[str, Log], name: str) -> None:
    """One figure of every run; a run has the same colour in every panel, also where others have no such figure."""
    for place, (run, log) in enumerate(runs.items()):
        _line(axis, series(log, name), run, color=f"C{place}")


def _rate(axis: Axes, runs: Mapping[str, Log]) -> None:
    _runs(axis, runs, "learning_rate")
    _finish(axis, "Learning rate", "learning rate (per step)", loss=False)


def _line(axis: Axes, points: tuple[list[int], list[float]], label: str, **style: Any) -> None:
    if points[0]:
        marker = "." if len(points[0]) <= _FEW else ""
        axis.plot(*points, label=_literally(label), marker=marker, linewidth=1.3, **style)


def _finish(axis: Axes, title: str, unit: str, loss: bool = True) -> None:
    """Names the axes, and makes a loss that falls far logarithmic."""
    axis.set_title(title)
    axis.set_xlabel("step (updates)")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.3)
    values = [value for line in axis.lines for value in np.asarray(line.get_ydata(), float).tolist() if value == value]
    if loss and values and min(values) > 0 and max(values) > _WIDE * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif values and min(values) >= 0:
        axis.set_ylim(bottom=0)
    if labels := axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize="small", ncols=2 if len(labels) > 6 else 1)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, two in a row. Figure, not pyplot: nothing global, and no window."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(_SIZE_INCHES[0] * columns, _SIZE_INCHES[1] * rows), dpi=_DPI, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _write(figure: Figure, out: str | os.PathLike[str], force: bool = True) -> None:
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the font may lack letters of a run's name
        figure.savefig(data, format="png")
    write_file(out, data.getvalue(), force)


def _colours(names: Sequence[str]) -> list[Any]:
    """Audio streams from dark to light, as their order; all else in colours that are told apart."""
    audio = [name for name in names if name.startswith("loss_audio")]
    shades = {name: colormaps["viridis"](0.9 * i / max(1, len(audio) - 1)) for i, name in enumerate(audio)}
    bright = iter(("tab:red", "tab:pink") if audio else ("C0", "C1", "C2", "C3", "C4"))
    return [shades[name] if name in shades else next(bright) for name in names]


def _literally(label: str) -> str:
    """A label as it is: matplotlib takes $ for mathematics, and leaves labels out that begin with _."""
    escaped = label.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _natural(name: str) -> tuple[str, int]:
    """audio2 before audio10."""
    letters = name.rstrip("0123456789")
    return letters, int(name[len(letters) :] or 0)
