"""YAML as recipes use it: plain values, and an error before a hostile text takes memory or time.

Numbers are those of YAML 1.2: `5e-4` is one, `1:30` and `2024-11-30` are text, and `010` is ten. Left out are
aliases, tags and merges, keys that are not words or stand twice, null bytes, whole numbers of more digits
than any setting has, and deep nesting.
"""

from __future__ import annotations

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


def load_yaml(text: str, *, only_words: bool = False) -> Any:
    """The value of a YAML text: dicts with text as keys, lists, text, numbers, None.

    Args:
        text: of a recipe, or of one of its values.
        only_words: every scalar is text, as in a list of names.

    Raises:
        yaml.YAMLError: if it is not YAML, or more than recipes may hold.
        RecursionError: not for a text within `MAX_BYTES`, but PyYAML is recursive.
    """
    return yaml.load(checked(text), Loader=_WordLoader if only_words else _Loader)


def load_word(text: str) -> Any:
    """A value of unknown type: a list, mapping or quoted text as YAML, else one scalar to its last character.

    Raises:
        yaml.YAMLError: as `load_yaml`.
    """
    if text.startswith(("[", "{", "'", '"')):
        return load_yaml(text)
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, checked(text), (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, text))


def checked(text: str) -> str:
    """A text as it stands.

    Raises:
        yaml.YAMLError: if it is longer than a recipe may be, or holds what no recipe can.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than {MAX_BYTES:,}")
    odd = _ODD.search(text)
    if odd:
        what = "a null byte" if odd[0] == "\0" else "bytes that are not UTF-8"
        raise yaml.YAMLError(f"{text[:40]!r} holds {what}")
    return text


def dump_yaml(values: dict[str, Any], *, compact: bool = False) -> str:
    """YAML that both `load_yaml` and other readers take for the same values; `compact`: a list is a line."""
    style: dict[str, Any] = {"default_flow_style": None, "width": 100} if compact else {}
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style))


class _Dumper(yaml.SafeDumper):
    """Quotes what one of the YAML versions takes for a number."""


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2, and none of what the module leaves out.

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
        return checked(value) if isinstance(value, str) else value

    def construct_whole(self, node: Any) -> int:
        """An integer, with digits in groups (1_000) or in another base (0x1f)."""
        if len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"{node.value[:10]}... is a whole number of {len(node.value):,} digits")
        digits = node.value.replace("_", "")
        return int(digits, 0 if re.match("[-+]?0[bx]", digits) else 10)


class _WordLoader(_Loader):
    """Every scalar is text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


_ODD = re.compile("[\0\ud800-\udfff]")
_OLD_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
_WHOLE = (
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(?:0x[0-9a-fA-F_]+|0b[01_]+|0[0-7_]*|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |\.(?:inf|Inf|INF|nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OLD_SCALARS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(*_WHOLE)
_Loader.add_implicit_resolver(*_FLOAT)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Dumper.add_implicit_resolver(*_FLOAT)
