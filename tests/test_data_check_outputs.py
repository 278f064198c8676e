"""What a check writes: the page, the cleaned list with its reasons, the command's answer and exit codes."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from edgeomni.cli import main
from edgeomni.data.check import check
from edgeomni.data.check_report import MOST_FINDINGS, html
from edgeomni.data.readers import DataSet, read_data
from edgeomni.data.records import Fault
from edgeomni.data.sample import Sample
from edgeomni.errors import DataError

RATE = 16000
HOSTILE = '<script>alert("1")</script>'
NAMES = ("good0", "silent", "good1", "loud", "good2")
BROKEN_LINE = 3


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three good samples, and between them a silent one, a clipped one, and a line that is no JSON."""
    time = np.arange(RATE) / RATE
    for i, hz in enumerate((200, 300, 400)):
        soundfile.write(tmp_path / f"good{i}.wav", 0.3 * np.sin(2 * np.pi * hz * time), RATE)
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(tmp_path / "loud.wav", np.clip(3 * np.sin(2 * np.pi * 90 * time), -1, 1), RATE, subtype="FLOAT")
    lines = [json.dumps({"audio": f"{name}.wav", "text": HOSTILE, "language": HOSTILE}) for name in NAMES]
    lines.insert(BROKEN_LINE - 1, "{no json")
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "t.jsonl"


@pytest.fixture
def good(data: Path) -> Path:
    """The good samples alone."""
    path = data.with_name("good.jsonl")
    path.write_text("".join(json.dumps({"audio": f"good{i}.wav", "text": "hello"}) + "\n" for i in range(3)))
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["data", "check", *map(str, words)])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Page(HTMLParser):
    """The tags of a page, its texts, and what it fetches."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


class TestCommand:
    def test_good_data(self, good: Path) -> None:
        result = run(good)
        assert (result.exit_code, "nothing was found" in result.stdout) == (0, True)
        assert "check: 3 of 3 samples" in result.stderr

    def test_findings_are_told_with_file_and_line(self, data: Path) -> None:
        result = run(data)
        assert result.exit_code == 1
        for line, kind in ((2, "silent"), (BROKEN_LINE, "line"), (5, "clipped")):
            assert f"{data}:{line}: {kind}: " in result.stdout

    def test_warnings_alone_fail_only_when_strict(self, data: Path) -> None:
        data.write_text(json.dumps({"audio": "loud.wav", "text": "hello"}) + "\n")
        assert run(data).exit_code == 0
        assert run(data, "--strict").exit_code == 1

    def test_json(self, data: Path) -> None:
        result = run(data, "--json")
        told = json.loads(result.stdout)
        assert (result.exit_code, told["format"], told["samples"], told["unusable"]) == (1, "native", 5, 1)
        assert told["counts"] == {"line": 1, "silent": 1, "clipped": 1}
        assert [(f["where"], f["kind"], f["unusable"]) for f in told["findings"]] == [
            (f"{data}:{BROKEN_LINE}", "line", True),
            (f"{data}:2", "silent", True),
            (f"{data}:5", "clipped", False),
        ]
        assert told["question_hours"] == pytest.approx(5 / 3600)
        assert told["languages"] == {HOSTILE: {"samples": 5, "hours": pytest.approx(5 / 3600)}}
        assert told["sample_rates"] == {"16000": 5}
        assert sum(told["question_seconds"]["counts"]) == 5

    def test_window_and_letters(self, good: Path) -> None:
        assert "too-long" in run(good, "--window", "0.9").stdout
        assert "letters to say" in run(good, "--letters", "4").stdout
        assert run(good, "--window", "0").exit_code == 1

    def test_format_is_insisted_on(self, good: Path) -> None:
        assert run(good, "--format", "native").exit_code == 0
        assert run(good, "--format", "nonsense").exit_code == 2

    def test_more_findings_than_are_shown_are_counted(self, tmp_path: Path) -> None:
        lines = [json.dumps({"audio": f"nowhere{i}.wav", "text": "hello"}) for i in range(60)]
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        assert "... and 10 more" in run(tmp_path / "t.jsonl").stdout


class TestFix:
    def test_what_can_be_used_stays_and_the_rest_is_explained(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        out = tmp_path / "sub" / "clean.jsonl"
        assert run(data, "--fix", out).exit_code == 1
        kept, before = read_data(out).samples, read_data(data).samples
        assert [sample.audio[0].source.resolve() for sample in kept] == [  # type: ignore[union-attr]
            (tmp_path / f"{name}.wav").resolve() for name in ("good0", "good1", "loud", "good2")
        ]
        assert {sample.text for sample in kept} == {HOSTILE}
        removed = lines_of(tmp_path / "sub" / "clean.jsonl.removed.jsonl")
        assert [(line["where"], [why["kind"] for why in line["why"]]) for line in removed] == [
            (f"{data}:{BROKEN_LINE}", ["line"]),
            (before[1].where, ["silent"]),
        ]
        assert all(why["what"] for line in removed for why in line["why"])
        assert run(out).exit_code == 0

    def test_strict_leaves_warnings_out_too(self, data: Path, tmp_path: Path) -> None:
        run(data, "--fix", tmp_path / "clean.jsonl", "--strict")
        assert len(lines_of(tmp_path / "clean.jsonl")) == 3
        assert len(lines_of(tmp_path / "clean.jsonl.removed.jsonl")) == 3
        assert run(tmp_path / "clean.jsonl", "--strict").exit_code == 0

    @pytest.mark.parametrize("existing", ["clean.jsonl", "clean.jsonl.removed.jsonl"])
    def test_files_that_exist_stay_as_they_are(self, good: Path, tmp_path: Path, existing: str) -> None:
        (tmp_path / existing).write_text("mine")
        result = run(good, "--fix", tmp_path / "clean.jsonl")
        assert result.exit_code == 2 and str(tmp_path / existing) in result.stderr
        assert "check:" not in result.stderr  # refused before any sound was decoded
        assert (tmp_path / existing).read_text() == "mine"
        assert run(good, "--fix", tmp_path / "clean.jsonl", "--force").exit_code == 0
        assert len(lines_of(tmp_path / "clean.jsonl")) == 3
        assert lines_of(tmp_path / "clean.jsonl.removed.jsonl") == []


class TestPage:
    def test_it_fetches_nothing_and_shows_texts_as_they_are(self, data: Path, tmp_path: Path) -> None:
        assert run(data, "--html", tmp_path / "r.html").exit_code == 1
        page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
        assert "script" not in page.tags
        assert HOSTILE in page.texts  # the language
        assert [link[:26] for link in page.links] == ["data:image/svg+xml;base64,"]
        for text in (f"{data}:2", "silent", "unusable", f"{data}:5", "clipped", "warning", f"{data}:{BROKEN_LINE}"):
            assert text in page.texts

    def test_the_picture_shows_durations_and_rates(self, data: Path, tmp_path: Path) -> None:
        run(data, "--html", tmp_path / "r.html")
        (link,) = Page((tmp_path / "r.html").read_text(encoding="utf-8")).links
        picture = ElementTree.fromstring(base64.b64decode(link.partition(",")[2]))
        assert picture.tag.endswith("svg")
        comments = base64.b64decode(link.partition(",")[2]).decode()
        for text in ("Duration of spoken questions", "Duration of spoken answers", "Sample rates", "16", "none"):
            assert f"<!-- {text} -->" in comments

    def test_what_does_not_fit_the_page_is_counted(self) -> None:
        faults = [Fault(f"t:{i}", "is no JSON") for i in range(MOST_FINDINGS + 7)]
        page = Page(html(check(DataSet([Sample("t:0", text="a", answer="b")], "native", faults, "t")), "T"))
        assert "7 more are not shown here; --json lists all." in page.texts
        assert f"t:{MOST_FINDINGS - 1}" in page.texts and f"t:{MOST_FINDINGS}" not in page.texts

    def test_without_matplotlib_it_says_what_to_install(self, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = run(good, "--html", good.with_name("r.html"))
        assert result.exit_code == 1 and "pip install" in result.stderr and "matplotlib" in result.stderr
        assert "check:" not in result.stderr  # before any sound was decoded
        assert not good.with_name("r.html").exists()
        assert run(good).exit_code == 0
        with pytest.raises(DataError, match="matplotlib"):
            html(check(read_data(good)), "T")


def test_a_check_needs_no_torch(good: Path) -> None:
    program = (
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"from edgeomni.cli import main\nmain(['data', 'check', {str(good)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, "nothing was found" in done.stdout) == (0, True), done.stderr
