"""Pictures of runs: what was plotted is read back from matplotlib's own objects, and the file is a PNG."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from edgeomni.errors import TrainError, UsageError
from edgeomni.train import curves
from edgeomni.train.curves import draw_comparison, draw_curves, series

LOG: list[dict[str, Any]] = [
    {
        "step": 10,
        "loss": 4.0,
        "learning_rate": 1e-3,
        "loss_text": 3.0,
        "loss_audio10": 5.0,
        "loss_audio2": 4.5,
        "loss_aa": 4.2,
    },
    {
        "step": 20,
        "loss": None,
        "learning_rate": 5e-4,
        "loss_text": 2.5,
        "loss_audio10": 4.0,
        "loss_audio2": 3.5,
        "loss_tt": 1.0,
    },
    {"step": 20, "eval_loss": 4.5, "eval_loss_text": 3.5, "eval_loss_tt": 1.5},
    {"step": 30, "loss": 2.0, "learning_rate": 0.0, "loss_text": 1.5, "loss_audio10": 3.0, "loss_audio2": 2.5},
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, so that their lines can be read."""
    figures: list[Figure] = []
    save = Figure.savefig

    def kept(self: Figure, *args: Any, **how: Any) -> None:
        figures.append(self)
        save(self, *args, **how)

    monkeypatch.setattr(Figure, "savefig", kept)
    monkeypatch.setattr(curves, "_DPI", 30)  # pixels take time
    return figures


def panels(figure: Figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title of each panel -> what its legend calls a line -> its points; dashed ones get a *."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for axis in figure.axes:
        assert axis.get_xlabel() == "step (updates)" and "(" in axis.get_ylabel()
        lines = {}
        for line in axis.lines:
            name = str(line.get_label()) if not str(line.get_label()).startswith("_") else ""
            lines[name + ("*" if line.get_linestyle() == "--" else "")] = [
                tuple(p) for p in np.asarray(line.get_xydata()).tolist()
            ]
        found[axis.get_title()] = lines
    return found


def test_every_figure_of_the_log_is_drawn_where_it_belongs(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_curves(LOG, tmp_path / "curves.png")
    shown = panels(drawn[0])
    loss = shown["Loss (dashed: validation)"]
    assert loss["training"][0] == (10, 4) and math.isnan(loss["training"][1][1]) and loss["training"][2] == (30, 2)
    assert loss["validation*"] == [(20, 4.5)]
    streams = shown["Loss by stream (dashed: validation)"]
    assert list(streams) == ["audio2", "audio10", "text", "*"]
    assert streams["audio10"] == [(10, 5), (20, 4), (30, 3)] and streams["*"] == [(20, 3.5)]
    tasks = shown["Loss by task (dashed: validation)"]
    assert tasks == {"aa": [(10, 4.2)], "tt": [(20, 1.0)], "*": [(20, 1.5)]}
    assert list(shown["Learning rate"].values()) == [[(10, 1e-3), (20, 5e-4), (30, 0)]]
    assert len(shown) == 4


def test_a_validation_curve_has_the_colour_of_its_training_curve(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_curves(LOG, tmp_path / "curves.png")
    by_stream = drawn[0].axes[1].lines
    text, dashed = [line for line in by_stream if line.get_label() == "text" or line.get_linestyle() == "--"]
    assert text.get_color() == dashed.get_color()
    assert len({str(line.get_color()) for line in by_stream}) == 3


def test_the_picture_is_a_png_with_something_on_it(tmp_path: Path) -> None:
    backend = matplotlib.get_backend()
    draw_curves(LOG, tmp_path / "curves.png")
    image = matplotlib.image.imread(tmp_path / "curves.png")
    assert image.shape[0] > 700 and image.shape[1] > 1200
    assert 0.01 < np.mean(image[..., :3].min(-1) < 0.5) < 0.2
    first = (tmp_path / "curves.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    draw_curves(LOG[:1], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes() != first
    assert matplotlib.get_backend() == backend


def test_no_pyplot_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys; from edgeomni.train.curves import draw_curves; draw_curves([dict(step=1, loss=1.0)], sys.argv[1]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.png")], check=True)


def test_what_the_log_lacks_has_no_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], tmp_path / "a.png")
    assert panels(drawn[0]) == {"Loss": {"training": [(1, 2), (2, 1)]}}
    draw_curves([{"step": 1, "eval_loss": 2.0}], tmp_path / "b.png")
    assert panels(drawn[1]) == {"Loss (dashed: validation)": {"validation*": [(1, 2)]}}


@pytest.mark.parametrize(
    ("values", "scale"),
    [([10, 0.4], "log"), ([10, 0.6], "linear"), ([10, 0], "linear"), ([1e4, 1], "log"), ([None, None], "linear")],
)
def test_a_loss_that_falls_far_is_drawn_logarithmically(
    values: list[float | None], scale: str, tmp_path: Path, drawn: list[Figure]
) -> None:
    draw_curves(
        [{"step": i, "loss": value, "learning_rate": value} for i, value in enumerate(values)], tmp_path / "a.png"
    )
    assert [axis.get_yscale() for axis in drawn[0].axes] == [scale, "linear"]


def test_runs_are_compared_under_their_names_and_in_their_colours(tmp_path: Path, drawn: list[Figure]) -> None:
    """The first run has no validation loss, which must not give its colour to the second one."""
    runs = {"_a$b^$": [{"step": 1, "loss": 3.0, "learning_rate": 1e-3}], "二": LOG, "c": [{"step": 5}]}
    draw_comparison(runs, tmp_path / "cmp.png")
    shown = panels(drawn[0])
    first, second = " _a\\$b^\\$", "二"
    assert {title: list(lines) for title, lines in shown.items()} == {
        "Training loss": [first, second],
        "Validation loss": [second],
        "Learning rate": [first, second],
    }
    assert shown["Training loss"][first] == [(1, 3)] and shown["Validation loss"][second] == [(20, 4.5)]
    colours = [[line.get_color() for line in axis.lines] for axis in drawn[0].axes]
    assert colours[0] == colours[2] and colours[1] == colours[0][1:] and colours[0][0] != colours[0][1]
    with pytest.raises(UsageError, match="exists"):
        draw_comparison(runs, tmp_path / "cmp.png", force=False)


def test_an_empty_log_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="holds no loss"):
        draw_curves([{"step": 1, "grad_norm": 1.0}], tmp_path / "a.png")
    with pytest.raises(TrainError, match="none of the runs"):
        draw_comparison({"a": [], "b": []}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_series_by_hand() -> None:
    assert series(LOG, "eval_loss") == ([20], [4.5])
    assert series(LOG, "loss_tt") == ([20], [1.0])
    assert series(LOG, "none") == ([], []) and curves.EVAL == "eval_"
