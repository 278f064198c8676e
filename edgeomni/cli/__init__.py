"""The command line: a thin skin over the library. Each command's module is imported when it is asked for."""

from __future__ import annotations

import click

from .. import __version__
from .common import CommandGroup, plain_messages


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, envvar="EDGEOMNI_DEBUG", help="Show tracebacks of errors.")
@click.version_option(__version__, "--version")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """Take a speech-to-speech omni model from checkpoint to a proven bundle that talks on an edge device.

    Exit codes: 0 fine, 1 failed, 2 usage, 3 a quality or latency gate was missed.
    """
    ctx.with_resource(plain_messages())
