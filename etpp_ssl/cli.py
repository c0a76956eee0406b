"""The command line: parse, call, print; nothing else.

Commands register themselves in the order of the imports, in which `etpp --help` lists them.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from etpp_ssl import cli_train, cli_use  # noqa: F401
from etpp_ssl.cli_app import app
from etpp_ssl.cli_end import endings


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command; a user's mistake is one line on stderr and exit code 2, a fault of a run code 1."""
    with endings(process_ends=arguments is None):
        # Typer's own way to tell a mistake is a box of several lines.
        sys.exit(app(args=arguments, prog_name="etpp", standalone_mode=False) or 0)
