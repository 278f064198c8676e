"""`optimum-cli export edgeomni`: found by optimum, with the options of `edgeomni export`, and ending as that does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest

pytest.importorskip("optimum.commands", reason="needs optimum: the extra [optimum]")

from edgeomni.bundle import Bundle  # noqa: E402
from edgeomni.cli.export import export_  # noqa: E402
from edgeomni.cli.optimum_command import EdgeOmniExportCommand, words  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
REGISTER = ROOT / "optimum_register" / "edgeomni.py"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import from, in which the registration lies where a wheel puts it."""
    site = tmp_path_factory.mktemp("site")
    namespace = site / "optimum" / "commands" / "register"
    namespace.mkdir(parents=True)
    shutil.copy(REGISTER, namespace)
    return site


def found_already() -> bool:
    """Whether EdgeOmni is installed so that optimum finds it: registered twice, optimum refuses."""
    spec = find_spec("optimum.commands.register")
    return any((Path(p) / "edgeomni.py").is_file() for p in (spec and spec.submodule_search_locations) or [])


def optimum_cli(installed: Path, *given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "edgeomni", *given]
    path = os.pathsep.join([*([] if found_already() else [str(installed)]), *(p for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def parsed(*given: str) -> list[str]:
    parser = ArgumentParser()
    EdgeOmniExportCommand.parse_args(parser)
    return words(parser.parse_args(list(given)))


def understood(arguments: list[str]) -> dict[str, Any]:
    """What click makes of arguments of `edgeomni export`."""
    return export_.make_context("export", arguments).params


def test_optimum_finds_it_and_its_help_has_every_option(installed: Path) -> None:
    done = optimum_cli(installed, "--help")
    assert done.returncode == 0, done.stderr
    names = {o for p in export_.params if isinstance(p, click.Option) for o in p.opts if o.startswith("--")}
    assert names - {"--output", "--help"} and [n for n in sorted(names - {"--output"}) if n not in done.stdout] == []


def test_the_same_words_mean_the_same() -> None:
    options = ["--precision", "int8", "--llm=onnx:int4", "--block", "32", "--gate", "llm.top1=0.5", "--gate", "a.b=-1"]
    options += ["--no-gate", "--force", "--flavour", "portable", "--threads", "1"]
    given = understood(parsed("--model", "ckpt", "out", *options))
    assert given == understood(["ckpt", "-o", "out", *options])
    assert given["gate"] == ("llm.top1=0.5", "a.b=-1") and given["force"] and given["block"] == 32


def test_defaults_are_those_of_edgeomni_export() -> None:
    assert understood(parsed("-m", "ckpt", "out")) == understood(["ckpt", "-o", "out"])
    random = ["--preset", "tiny", "--random", "--seed", "3"]
    assert understood(parsed("out", *random)) == understood(["-o", "out", *random])


def test_names_that_begin_with_a_dash_stay_names() -> None:
    given = understood(parsed("--model=-ckpt", "--", "-out"))
    assert (given["checkpoint"], given["output"]) == ("-ckpt", "-out")


def test_it_writes_a_bundle(installed: Path, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    done = optimum_cli(installed, "--preset", "tiny", "--random", str(target), "--precision", "fp32", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert Bundle.open(target, hashes=True).manifest.components["llm"].engine == "onnxruntime"


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (["--model", "nano", "--precision", "int3", "out"], 2, "int3"),
        (["--preset", "tiny", "--random", "--gate", "llm.error=0", "--precision", "int8", "out"], 3, "llm.error"),
    ],
)
def test_it_ends_with_the_same_codes(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = optimum_cli(installed, *given)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_the_help_repeats_what_click_says_of_each_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words, its placeholder, and its default where click shows that."""
    monkeypatch.setenv("COLUMNS", "1000")
    parser = ArgumentParser()
    EdgeOmniExportCommand.parse_args(parser)
    said = " ".join(parser.format_help().split()) + " -"
    options = [p for p in export_.params if isinstance(p, click.Option) and p.name not in ("output", "help")]
    assert len(options) > 10
    for option in options:
        placeholder = " " + (option.metavar or (option.name or "").upper())
        if isinstance(option.type, click.Choice):
            placeholder = f" {{{','.join(option.type.choices)}}}"
        shown = option.show_default and not option.is_flag and option.default is not None
        words = f"{option.help}{f' [default: {option.default}]' if shown else ''}"
        assert option.help and f"{option.opts[0]}{'' if option.is_flag else placeholder} {words} -" in said
