"""Text of bundles, errors and answers reaches the terminal as text: no escape codes, no markup."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from fakes import small_bundle, small_spec
from rich.console import Console
from rich.table import Table

from edgeomni.bundle import MANIFEST
from edgeomni.cli import main
from edgeomni.cli.sinks import Sinks
from edgeomni.cli.terminal import answer_text, plain, visible

ESCAPE, C1_CSI, BELL = "\x1b", "\x9b", "\x07"
HOSTILE = f"MIT {ESCAPE}[2J{C1_CSI}31m{BELL}\r[link=https://example.org]click[/link] [/] \u202eevil"


def drawn(cell: object) -> str:
    """What a colour terminal would get for a table with this cell."""
    out = Console(file=io.StringIO(), force_terminal=True, width=200, color_system="truecolor")
    table = Table("x", title=cell)  # type: ignore[arg-type]
    table.add_row(cell)  # type: ignore[arg-type]
    out.print(table)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_a_cell_is_text_and_nothing_else() -> None:
    shown = drawn(plain(HOSTILE))
    assert "[link=https://example.org]click[/link] [/] evil" in shown
    for bad in (f"{ESCAPE}[2J", C1_CSI, BELL, "\r", "\u202e", f"{ESCAPE}]8;"):
        assert bad not in shown, bad
    assert plain("a\nb\tc").plain == "a b c"
    assert plain(12).plain == "12"


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_every_control_character_is_written_out_dropped_or_a_line_break(code: int) -> None:
    text = f"a{chr(code)}b"
    assert plain(text).plain == ("a b" if chr(code) in "\n\t" else "ab")
    assert answer_text(text) == (text if chr(code) in "\n\t" else "ab")
    assert visible(text) == (text if chr(code) in "\n\t" else f"a{ascii(chr(code))[1:-1]}b")


def test_writing_of_all_kinds_is_left_alone() -> None:
    for text in ("Grüße", "日本語", "\u05e9\u05dc\u05d5\u05dd", "a\u00a0b", "🙂"):
        assert plain(text).plain == visible(text) == answer_text(text) == text
    assert answer_text("\u200fשלום") == "\u200fשלום", "marks that right-to-left text needs"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A bundle whose every free text is hostile."""
    root = small_bundle(tmp_path / "bundle", small_spec(), licences={"llm": HOSTILE, f"x{HOSTILE}": "MIT"})
    data = json.loads((root / MANIFEST).read_text())
    data["provenance"].update(source=HOSTILE, command=HOSTILE, tools={HOSTILE: HOSTILE})
    data["gate"] = {"fidelity": {HOSTILE: {"value": HOSTILE, "at_least": HOSTILE, "verdict": HOSTILE}}, "quality": 3}
    for component in data["components"].values():
        component.update(engine=HOSTILE, precision=HOSTILE, scheme={HOSTILE: HOSTILE})
        for graph in component["graphs"].values():
            graph["inputs"][0].update(name=HOSTILE, dtype=HOSTILE, shape=[HOSTILE])
    (root / MANIFEST).write_text(json.dumps(data))
    return root


def test_inspect_shows_a_hostile_bundle_as_text(hostile: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(hostile)], color=True)
    assert result.exit_code == 0, result.output
    assert not any(c in result.output for c in (ESCAPE, C1_CSI, BELL, "\r", "\u202e"))
    assert result.output.count("[link=") >= 10


def test_errors_and_warnings_write_control_characters_out(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["verify", f"gone{ESCAPE}[2J"], color=True)
    assert result.exit_code == 1 and ESCAPE not in result.stderr and r"gone\x1b[2J: no such bundle" in result.stderr
    root = small_bundle(tmp_path / "bundle", small_spec())
    data = json.loads((root / MANIFEST).read_text())
    (root / MANIFEST).write_text(json.dumps({**data, "schema": "2.9", f"{ESCAPE}[2J": 1}))
    result = CliRunner().invoke(main, ["inspect", str(root)], color=True)
    assert result.exit_code == 0 and ESCAPE not in result.stderr and "ignored" in result.stderr


def test_an_answer_commands_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Sinks(None, False, 24000) as sinks:
        sinks.text(f"Hello{ESCAPE}[2J\n{C1_CSI}you\u0085")
    assert capsys.readouterr().out == "Hello[2J\nyou"
