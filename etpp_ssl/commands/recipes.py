"""`etpp recipes`: the recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

from etpp_ssl.recipe_file import find_shipped, shipped_recipes


def print_recipes(name: str | None = None) -> None:
    """Print names and purposes of all recipes, or the file of one, for a copy to change.

    What a recipe extends is a name, which is found from any folder.

    Raises:
        UserError: for an unknown name, with those that are close.
    """
    if name is not None:
        print(find_shipped(name).read_text(encoding="utf-8"), end="")
        return
    for known, file in shipped_recipes().items():
        print(f"{known:34} {purpose(file)}")


def purpose(file: Path) -> str:
    """The first sentence of a recipe's header, without its full stop."""
    paragraph: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        paragraph.append(text)
    return " ".join(paragraph).split(". ")[0].removesuffix(".")
