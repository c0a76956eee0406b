"""Print parameters and multiply-adds of the supervised recipes at each stage, as a Markdown table.

python tools/families_table.py

Counted on the meta device by torch's counter, forward pass of one image; nothing is trained.
"""

from __future__ import annotations

from pathlib import Path

from etpp_ssl.config import show_size
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.train.plan import plan_run

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("in1k_*_etpp200.yaml"))


def main() -> None:
    """A line for each recipe."""
    print("| recipe | parameters (M) | G multiply-adds | compute of 300 epochs over the run's: area, FLOPs |")
    print("|---|---|---|---|")
    for path in RECIPES:
        plan = plan_run(FinetuneRecipe.load(path))
        costs = ", ".join(
            f"{show_size(row.stage.bandwidth)}: {row.cost.forward_flops / 2e9:.3g}" for row in plan.stages
        )
        name = path.stem.removeprefix("in1k_").removesuffix("_etpp200")
        speedups = f"{plan.speedup_by_area:.2f}, {plan.speedup_by_flops:.2f}"
        print(f"| `{name}` | {plan.parameters / 1e6:.2f} | {costs} | {speedups} |", flush=True)


if __name__ == "__main__":
    main()
