"""What all commands share: late imports, errors and warnings as one plain line, shared options."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar, get_args

import click
from rich.console import Console

from ..engines import AUTO, ENGINES, Device, parse_engine
from ..errors import EdgeOmniError, UsageError
from ..install_hint import install_command
from ..overlap import OverlapChoice
from .terminal import visible

F = TypeVar("F", bound=Callable[..., Any])

COMMANDS = {
    "init": "init",
    "data": "data",
    "train": "train",
    "train-codec": "train_codec",
    "compare-runs": "compare_runs",
    "merge": "merge",
    "export": "export",
    "combine": "combine",
    "run": "run",
    "inspect": "bundles",
    "verify": "verify",
    "profile": "profile",
    "evaluate": "evaluate",
    "demo": "demo",
    "doctor": "doctor",
}
"""Command -> module of this package that holds it, under the command's name (`init_`, `train_codec_`, ...)."""
DATA_COMMANDS = {"check": "data_check", "prepare": "data_prepare", "synth": "data_synth"}
"""The same for `edgeomni data ...`."""
INTERRUPTED = 130
PIPED_WIDTH = 120


class LazyGroup(click.Group):
    """Imports a command when it is asked for. `lazy`: command -> module of this package that holds it."""

    lazy: dict[str, str] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        module = import_module(f".{self.lazy[cmd_name]}", __package__)
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_")
        return command


class DataGroup(LazyGroup):
    lazy = DATA_COMMANDS


class CommandGroup(LazyGroup):
    """All commands; turns errors into one line on stderr and an exit code."""

    lazy = COMMANDS

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as exc:
            if ctx.params.get("debug"):
                raise
            raise _Failure(exc) from exc


class _Failure(click.ClickException):
    def __init__(self, exc: Exception) -> None:
        super().__init__(visible(_describe(exc)))
        self.exit_code = exc.exit_code if isinstance(exc, EdgeOmniError) else 1  # type: ignore[misc]


def _describe(exc: Exception) -> str:
    if isinstance(exc, EdgeOmniError):
        return str(exc)
    if isinstance(exc, ModuleNotFoundError) and (exc.name or "").startswith("edgeomni."):
        return f"this copy of EdgeOmni is incomplete: {exc.name} is missing; install it: {install_command()}"
    if isinstance(exc, ModuleNotFoundError):
        return f"{exc.name} is not installed, and this needs it: {install_command('export')} (see `edgeomni doctor`)"
    if isinstance(exc, OSError) and exc.strerror:
        return f"{exc.filename or 'system'}: {exc.strerror}"
    return f"{type(exc).__name__}: {exc} (not expected: run `edgeomni --debug ...` and report the traceback)"


@contextmanager
def plain_messages() -> Iterator[None]:
    """The library's warnings and log records as `warning: ...` on stderr, while a command runs."""
    logger, handler = logging.getLogger("edgeomni"), _Stderr()
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kw: click.echo(visible(f"warning: {message}"), err=True)
        try:
            yield
        finally:
            logger.removeHandler(handler)


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(visible(f"{record.levelname.lower()}: {record.getMessage()}"), err=True)


@contextmanager
def verbosity(quiet: bool, verbose: bool) -> Iterator[None]:
    """`--quiet` leaves errors alone of the library's messages, `--verbose` adds its information."""
    logger = logging.getLogger("edgeomni")
    before = logger.level
    logger.setLevel(logging.ERROR if quiet else logging.INFO if verbose else before)
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(before)


def console(*, err: bool = False) -> Console:
    """Where tables go. Text is never taken as markup: it may come from files.

    Without a terminal the width is COLUMNS, or enough for most tables.
    """
    out = Console(stderr=err, highlight=False, markup=False, emoji=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = PIPED_WIDTH
    return out


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, shown in the order given."""

    def apply(command: F) -> F:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


verbosity_options = options(
    click.option("-q", "--quiet", is_flag=True, help="Only the answer and errors."),
    click.option("-v", "--verbose", is_flag=True, help="Also engines, threads and the time of each stage."),
)


class EngineType(click.ParamType):
    """An engine's name, or COMPONENT=ENGINE pairs with commas between them."""

    name = "engine"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return parse_engine(value) if isinstance(value, str) else value
        except UsageError as exc:
            self.fail(str(exc), param, ctx)


engine_options = options(
    click.option("--threads", type=click.IntRange(1), help="Threads to compute with [default: all cores]."),
    click.option(
        "--device",
        type=click.Choice(get_args(Device)),
        help="Where to compute [default: what this machine has, as the bundle suits it].",
    ),
    click.option(
        "--engine",
        type=EngineType(),
        metavar="ENGINE",
        help=f"{', '.join([AUTO, *ENGINES])} (torch is for checkpoints), or encoder=ENGINE,llm=ENGINE,codec=ENGINE "
        "[default: auto, the best that SOURCE and this machine have].",
    ),
    click.option(
        "--strict",
        is_flag=True,
        help="A step down to another engine or device is an error; in run also ids that are no codec entries.",
    ),
)
overlap_option = click.option(
    "--overlap",
    type=click.Choice(get_args(OverlapChoice)),
    default="auto",
    show_default=True,
    help="Whether the codec computes beside the LLM: as is faster here (timed once), always, or never.",
)
force_option = click.option("--force", is_flag=True, help="Overwrite what exists.")
