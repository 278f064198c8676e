"""`edgeomni combine`."""

from __future__ import annotations

import click

from ..engines import COMPONENTS
from .common import force_option


@click.command("combine")
@click.argument("bundles", nargs=-1, required=True)
@click.option("-o", "--output", required=True, help="Bundle directory to write.")
@force_option
def combine_(bundles: tuple[str, ...], output: str, force: bool) -> None:
    """Put BUNDLES of one checkpoint together: one bundle that has its components in all their formats.

    --engine auto then takes for each component what this machine can open, and what a profile found the fastest
    (edgeomni profile BUNDLE --compare). The first of BUNDLES is what the result is judged and replayed as.

    \b
    edgeomni combine openvino-bundle onnx-bundle -o both
    """
    from ..combine import combine

    made = combine(bundles, output, force=force)
    click.echo(f"{output}: written, {made.size / 1e6:.1f} MB", err=True)
    for name in COMPONENTS:
        entries = [made.manifest.components[name], *made.manifest.alternatives.get(name, [])]
        click.echo(f"  {name}: {', '.join(f'{entry.format}:{entry.precision}' for entry in entries)}", err=True)
