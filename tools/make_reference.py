"""Write docs/reference/keys.md and docs/reference/commands.md from the Configs and from the command line.

    python tools/make_reference.py [--check]

With --check nothing is written; it ends with an error if a page is not what the code says now.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from etpp_ssl.cli import app
from etpp_ssl.commands.keys import markdown_reference

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- Written by tools/make_reference.py; change the docstrings it is made from instead. -->"

KEYS = f"""{NOTE}
# Recipe keys

A recipe is a YAML file with these keys; on the command line each is `section.key=value`, and
`section=name` stands for `section.name=name`. `etpp keys SECTION` prints them in a terminal.

The type of a key decides how an override is read: text is taken as it stands (`"data.root=set #1"`,
`output=20241130`), anything else as YAML (`image_size=[192, 256]`), and `null` or `None` empties a key
that may be empty. In a file text that looks like a number, or holds ` #` or `: `, needs quotes.

*Resume* says whether a run may be resumed with another value: **yes** for keys that do not change the
trained weights. Any other change is refused on resume, naming the key; `--fork` continues in a new folder.

"""
COMMANDS = f"""{NOTE}
# Commands

`etpp COMMAND ...`, or `accelerate launch -m etpp_ssl COMMAND ...` for several processes. A mistake is one
line on stderr and the exit code 2; [Run folder](run-folder.md) has the other exit codes.

"""


def main() -> None:
    """Parse, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    check = parser.parse_args().check
    for name, text in pages().items():
        file = REFERENCE / name
        if not check:
            file.write_text(text, encoding="utf-8")
            print(file)
        elif not file.is_file() or file.read_text(encoding="utf-8") != text:
            sys.exit(f"{file} is not what the code says now; write it anew: python tools/make_reference.py")


@cache
def pages() -> dict[str, str]:
    """The generated pages by file name."""
    return {"keys.md": KEYS + markdown_reference(), "commands.md": commands_page()}


def commands_page() -> str:
    """Every command with its arguments and options."""
    return COMMANDS + "\n".join(
        command_section(info.name or info.callback.__name__, info.callback)
        for info in app.registered_commands
        if info.callback is not None and not info.hidden
    )


def command_section(name: str, command: Callable[..., Any]) -> str:
    """A command as a section, from its signature: typer's own objects differ from version to version."""
    usage, rows = [f"etpp {name}"], []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind, info = get_args(parameter.annotation)
        required = parameter.default is parameter.empty
        if isinstance(info, typer.models.OptionInfo):
            names = f"`{' '.join(info.param_decls or ()) or '--' + parameter.name.replace('_', '-')}`"
            choices = [value for part in (kind, *get_args(kind)) for value in choices_of(part)]
            shown = names + (f" {', '.join(f'`{choice}`' for choice in choices)}" if choices else "")
        else:
            metavar = info.metavar or parameter.name.upper()
            usage.append(metavar if required or metavar.startswith("[") else f"[{metavar}]...")
            shown = f"`{metavar}`"
        # The number of cores is a machine's, not the documentation's.
        default = "cores" if parameter.name == "workers" else parameter.default
        empty = required or default is None
        rows.append(f"| {shown} | {'' if empty else f'`{default}`'} | {cell(info.help or '')} |")
    lines = [f"## {name}", "", inspect.getdoc(command) or "", "", "```text", " ".join(usage), "```", ""]
    return "\n".join([*lines, "| argument or option | default | meaning |", "|---|---|---|", *rows, ""])


def choices_of(kind: Any) -> list[str]:
    """The values of a literal type."""
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def cell(text: str) -> str:
    """Text as one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    main()
