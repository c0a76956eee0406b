"""`etpp search`: the images of a folder that are most like some others.

Legend: Q queries, n images, D width, k nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from etpp_ssl.commands.embed import embed, of_folder
from etpp_ssl.config import UserError
from etpp_ssl.evaluation.features import Pool, read_embeddings
from etpp_ssl.recipe import load_any
from etpp_ssl.run_folder import RunFolder

if TYPE_CHECKING:
    from etpp_ssl.encoder import Encoder

BLOCK = 65536
"""Images that are compared at once."""


@dataclass(frozen=True)
class Neighbours:
    """What was found."""

    folder: Path
    queries: list[str]
    names: list[list[str]]
    """Per query the images, relative to the folder, the most similar first."""
    similarities: Tensor
    """float32 (Q, k), cosines."""

    def values(self) -> dict[str, Any]:
        """For JSON."""
        found = zip(self.queries, self.names, self.similarities.tolist(), strict=True)
        return {
            "folder": str(self.folder),
            "queries": [
                {
                    "query": query,
                    "nearest": [{"image": n, "similarity": s} for n, s in zip(names, row, strict=True)],
                }
                for query, names, row in found
            ],
        }


def nearest(queries: Tensor, features: Tensor, count: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The rows of largest cosine, exactly, in blocks: float32 (Q, k) and int64 (Q, k), largest first.

    Args:
        queries: float32 (Q, D).
        features: float32 (n, D).
        count: k; fewer if n is less.
        block: rows that are compared at once.
    """
    wanted = normalize(queries, dim=1)
    values = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(features), block):
        part = features[start : start + block]
        # Dividing the products spares a normalised copy of all features.
        similar = wanted @ part.T / torch.linalg.vector_norm(part, dim=1).clamp(min=1e-12)
        best, places = similar.topk(min(count, similar.shape[1]), dim=1)
        values, rows = torch.cat([values, best], 1), torch.cat([rows, places + start], 1)
        values, order = values.topk(min(count, values.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return values, rows


def search(
    run: str,
    encoder: Encoder,
    queries: Sequence[str],
    folder: str,
    *,
    count: int = 8,
    pool: Pool | None = None,
    say: Callable[[str], None],
) -> Neighbours:
    """Embed the folder, as `etpp embed RUN FOLDER` does, and compare the queries with it.

    Args:
        run: the folder of a run.
        encoder: the run's, as `etpp_ssl.load` gives it.
        queries: files.
        folder: of images.
        count: k, at most n.
        pool: a ViT's "token" or "avg"; None is the encoder's own.
        say: see `embed`.

    Raises:
        UserError: for a query that is not an image or has other channels, or a folder without images.
    """
    wanted = encoder.embed(list(queries), pool=pool)
    own = RunFolder(run)
    overrides, file = of_folder([folder], own)
    recipe = load_any(run, overrides)
    file = embed(recipe, own, file, split="train", pool=pool, batch_size=256, say=say)
    found = read_embeddings(file)
    values, rows = nearest(wanted, found.rows.features, count)
    names = [[found.names[row] for row in of_query] for of_query in rows.tolist()]
    return Neighbours(Path(folder).resolve(), list(queries), names, values)


def check_run(run: str) -> None:
    """Refuse what is not a run.

    Raises:
        UserError: if it is none.
    """
    if not RunFolder(run).exists():
        raise UserError(f"{run!r} is not the folder of a run; etpp search takes one with a checkpoint")
