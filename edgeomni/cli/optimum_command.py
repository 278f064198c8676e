"""`optimum-cli export edgeomni`: the command `edgeomni export` under the form that optimum gives its exporters.

optimum names the model by --model and the output by its place. All other options are those of `edgeomni export`, read
from its click command when the parser is made, so that both command lines always offer the same.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from typing import Any

import click
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from . import main
from .export import export_

_NOT_OPTIONS = {"output", "help"}
_DESCRIPTION = (
    "Make a bundle of a checkpoint, judged by the gate before it gets its name. Same as\n"
    "`edgeomni export CHECKPOINT -o BUNDLE`; exit codes: 0 fine, 1 failed, 2 usage, 3 the gate was missed."
)


class EdgeOmniExportCommand(BaseOptimumCLICommand):
    """What optimum's registration asks for: a parser, and `run` with the arguments that it found."""

    COMMAND = CommandInfo(name="edgeomni", help="Make an EdgeOmni bundle of a speech-to-speech checkpoint.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Adds the arguments to optimum's parser."""
        parser.description, parser.formatter_class = _DESCRIPTION, RawDescriptionHelpFormatter
        parser.add_argument(
            "-m", "--model", metavar="CHECKPOINT", help="Checkpoint directory, or a shipped model: nano."
        )
        parser.add_argument("output", metavar="BUNDLE", help="Bundle directory to write.")
        for option in _options():
            _add(parser, option)

    def run(self) -> None:
        """Runs `edgeomni export` and ends the process with its exit code."""
        main(args=["export", *words(self.args)], prog_name="edgeomni")


def words(given: Namespace) -> list[str]:
    """The parsed arguments -> those of `edgeomni export`. Options that were not given are left out, so that its own
    defaults hold."""
    found = [f"--output={given.output}"]
    for option in _options():
        value = getattr(given, option.name or "", None)
        if value is None or value is False:
            continue
        name = option.opts[-1]
        if option.is_flag:
            found.append(name)
            continue
        for text in value if option.multiple else [value]:
            found.append(f"{name}={text}")
    return [*found, *([] if given.model is None else ["--", given.model])]


def _options() -> Iterator[click.Option]:
    for parameter in export_.params:
        if isinstance(parameter, click.Option) and parameter.name not in _NOT_OPTIONS:
            yield parameter


def _add(parser: ArgumentParser, option: click.Option) -> None:
    """The option with its names and help; what it may hold is judged by click, when the command runs."""
    how: dict[str, Any] = {"dest": option.name, "default": SUPPRESS, "help": _help(option)}
    if option.is_flag:
        parser.add_argument(*option.opts, action="store_true", **how)
        return
    action = "append" if option.multiple else "store"
    parser.add_argument(*option.opts, action=action, metavar=_metavar(option), **how)


def _metavar(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return f"{{{','.join(map(str, option.type.choices))}}}"
    return option.metavar or (option.name or "").upper()


def _help(option: click.Option) -> str:
    text = option.help or ""
    if option.show_default and not option.is_flag and option.default is not None:
        text += f" [default: {option.default}]"
    return text.replace("%", "%%")
