"""Registers `optimum-cli export edgeomni`: optimum reads every file of its namespace `optimum.commands.register`.

It is installed as optimum/commands/register/edgeomni.py. That folder, like optimum itself, is a namespace (PEP 420)
that several distributions fill, and therefore must never hold an __init__.py.
"""

from optimum.commands.export.base import ExportCommand

from edgeomni.cli.optimum_command import EdgeOmniExportCommand

REGISTER_COMMANDS = [(EdgeOmniExportCommand, ExportCommand)]
