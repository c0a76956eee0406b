"""YAML as recipes use it: plain values, and an error before a hostile text takes memory or time.

Left out are aliases, tags and merges, keys that are not words or stand twice, null bytes, whole numbers of
more digits than any setting has, and deep nesting.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from etpp_ssl.messages import shown

MAX_BYTES = 1 << 17
"""Of a recipe; PyYAML takes seconds for so many."""
MAX_DEPTH = 32
MAX_DIGITS = 40
"""Of a whole number; Python takes the square of the time for more of them."""


def load_yaml(text: str) -> Any:
    """The value of a YAML text: dicts with text as keys, lists, text, numbers, dates, None.

    Raises:
        yaml.YAMLError: if it is not YAML, or more than recipes may hold.
        ValueError: for a malformed number or date.
        RecursionError: not for a text within `MAX_BYTES`, but PyYAML is recursive.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than {MAX_BYTES:,}")
    return yaml.load(text, Loader=_Loader)


def quoted(text: str) -> str:
    """Any text as YAML on one line."""
    return yaml.dump(text, default_style='"', width=math.inf).strip()


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (plain PyYAML reads `5e-4` as a string), and none of what the module leaves out.

    A few nested aliases would expand to more than any memory holds.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"aliases (*{event.anchor}) are not supported in recipes")
        if getattr(self.peek_event(), "tag", None) is not None:
            raise yaml.YAMLError(f"tags ({shown(self.peek_event().tag)}) are not supported in recipes")
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        line = node.start_mark.line + 1
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.YAMLError("merges (<<) are not supported in recipes")
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"key {shown(key)} below line {line} is not a word: put it in quotes")
            if key in seen:
                raise yaml.YAMLError(f"key {shown(key)} stands twice below line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        odd = _ODD.search(value) if isinstance(value, str) else None
        if odd:
            what = "a null byte" if odd[0] == "\0" else "bytes that are not UTF-8"
            raise yaml.YAMLError(f"{value[:40]!r} holds {what}")
        return value

    def construct_whole(self, node: Any) -> int:
        """An integer; base 60, which is part of YAML 1.1, makes one of any length, too."""
        if len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"{node.value[:10]}... is a whole number of {len(node.value):,} digits")
        return int(self.construct_yaml_int(node))


_ODD = re.compile("[\0\ud800-\udfff]")

_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |\.(?:inf|Inf|INF|nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
