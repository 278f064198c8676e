"""`edgeomni data`: training and test data, looked at, prepared and synthesized."""

from __future__ import annotations

import click

from .common import DataGroup


@click.group("data", cls=DataGroup)
def data_() -> None:
    """Check, prepare and synthesize training and test data."""
