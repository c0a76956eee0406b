"""`etpp tune`: a recipe's curriculum, searched for at one fixed compute.

This is the computation-constrained sequential search of EfficientTrain++ (TPAMI 2024): the run's compute is
cut into stages of equal shares, and these are settled one after another. Each stage tries the bandwidths from
that of the stage before it up, all later stages at full resolution, and takes the smallest whose result is
not worse than the best by more than a margin. Other settings can be tried before it, by successive halving:
all of them at a part of the compute, the better half at twice as much, and so on.

The judge is the recipe's own probe, or a classifier's accuracy, on a holdout of the training images; no test
image has a part in it. Runs are ordinary ones below the output folder. What is recorded in `trials.jsonl` is
not run again, so that the same command resumes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from etpp_ssl.cli_end import is_one_of_several
from etpp_ssl.commands.extending import extending
from etpp_ssl.config import UserError, listed
from etpp_ssl.curriculum.base import legal_bandwidth
from etpp_ssl.files import append_line, write_text
from etpp_ssl.recipe import FinetuneRecipe, Recipe, load_any
from etpp_ssl.run_folder import parse_row
from etpp_ssl.train.launch import finetune, pretrain
from etpp_ssl.train.plan import plan_run

TRIALS = "trials.jsonl"
TUNED = "tuned.yaml"
PAPER = (96, 128, 160, 192, 224)
"""Bandwidths at 224 pixels that are tried unless others are given."""
HOLDOUT_SHARE = 0.1
"""Of the training images, for the judge, where the recipe has no holdout of its own."""
JUDGES = {
    "knn": "knn_top1",
    "linear_cached": "linear_cached_top1",
    "attentive": "attentive_top1",
    "linear": "linear_top1",
    "reconstruction": "heldout_loss",
}
"""Results that probes are compared by; all but a loss in per cent."""
FEWEST_SEEDS = 2
"""That tell a margin."""


class Setting(NamedTuple):
    """What a run is tried with."""

    bandwidths: tuple[int, ...]
    """Of the shorter side, in pixels, one for each stage."""
    varied: tuple[str, ...] = ()
    """`section.key=value` each."""
    share: float = 1.0
    """Of the recipe's compute."""

    @property
    def name(self) -> str:
        """What it is found by, in a file and in a table."""
        shown = "-".join(map(str, self.bandwidths))
        parts = [shown, *self.varied, *([f"{self.share:g} of compute"] if self.share != 1 else [])]
        return ", ".join(parts)


class Tried(NamedTuple):
    """A setting's results."""

    setting: Setting
    values: tuple[float, ...]
    """One for each seed."""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.values)


class Decision(NamedTuple):
    """Settings that were compared, and the one that was taken."""

    title: str
    tried: list[Tried]
    taken: Setting
    why: str

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows for people."""
        rows = []
        for one in self.tried:
            deviation = f"{stdev(one.values):.2f}" if len(one.values) > 1 else ""
            mark = "taken" if one.setting == self.taken else ""
            rows.append([one.setting.name, f"{one.mean:.4g}", deviation, mark])
        return ["setting", "mean", "deviation", ""], rows


@dataclass(frozen=True)
class Tuned:
    """The result of `etpp tune`."""

    decisions: list[Decision]
    judge: str
    margin: float
    setting: Setting
    recipe: Path
    """Extends the given recipe by what was found."""

    @property
    def notes(self) -> list[str]:
        """What was found, as sentences."""
        return [
            f"{self.setting.name}: bandwidths of stages of equal compute.",
            f"Compared by {self.judge} on a holdout of the training images, with a margin of "
            f"{self.margin:.3g}; no test image had a part in it.",
            f"Recipe: {self.recipe}.",
        ]


@dataclass
class Search:
    """What is searched, and the runs so far.

    Args:
        source: a recipe's file or name.
        overrides: of every run.
        num_stages: of equal compute.
        bandwidths: of the shorter side, in pixels; None takes the paper's, scaled.
        seeds: how many runs each setting has.
        margin: points that a smaller bandwidth may be worse by; None measures it: the standard error of the
            difference of two means over the seeds, from the runs at full resolution.
        vary: `section.key=value,value` each; all combinations are tried.
        output: folder of everything.
        say: told of each run.

    Raises:
        UserError: for what cannot be searched.
    """

    source: str
    overrides: tuple[str, ...]
    num_stages: int
    bandwidths: tuple[int, ...] | None
    seeds: int
    margin: float | None
    vary: tuple[str, ...]
    output: Path
    say: Callable[[str], None]
    results: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if is_one_of_several():
            raise UserError("etpp tune runs in one process, one run after another")
        self.recipe = load_any(self.source, self.overrides)
        recipe = self.recipe
        if recipe.budget_epochs is None:
            raise UserError("etpp tune compares runs of equal compute: give budget_epochs, not budget_hours")
        if recipe.curriculum.name == "constant":
            raise UserError("curriculum is constant, and etpp tune searches for its stages: efficienttrain")
        if self.margin is None and self.seeds < FEWEST_SEEDS:
            raise UserError(
                f"a margin is measured over {FEWEST_SEEDS} seeds at least: give --margin, or --seeds 3"
            )
        self.full = min(recipe.size)
        asked = self.bandwidths or tuple(round(self.full * bandwidth / PAPER[-1]) for bandwidth in PAPER)
        self.candidates = self._legal(asked, given=self.bandwidths is not None)
        self.judge, self.judging = self._judge()
        self.variants = list(self._variants())

    def _legal(self, asked: Sequence[int], *, given: bool) -> list[int]:
        size, multiple = self.recipe.size, self.recipe.bandwidth_multiple
        short = size.index(min(size))
        legal = range(2 * multiple[short], self.full + 1, multiple[short])
        wrong = [bandwidth for bandwidth in asked if bandwidth not in legal]
        if wrong and given:
            raise UserError(
                f"--bandwidths has {listed([str(bandwidth) for bandwidth in wrong])}: legal are multiples of "
                f"{multiple[short]} from {legal[0]} to {self.full}"
            )
        whole = {
            legal_bandwidth((b * size[0] / self.full, b * size[1] / self.full), size, multiple)[short]
            for b in asked
        }
        return sorted(whole | {self.full})

    def _judge(self) -> tuple[str, tuple[str, ...]]:
        """The result that is compared, and the overrides that keep it from test images."""
        recipe = self.recipe
        own = "data.num_images=null" if recipe.data.stated_images is not None else ""
        common = [text for text in (own, "tracker=none", "checkpoint.keep=1") if text]
        if isinstance(recipe, FinetuneRecipe):
            share = recipe.data.holdout_share or HOLDOUT_SHARE
            return "top1", (*common, f"data.holdout_share={share:g}", "evaluate.split=holdout")
        if recipe.probe.name not in JUDGES:
            raise UserError(
                "etpp tune compares runs by their probe, and probe is none: give probe=knn, for instance"
            )
        holdout = recipe.data.holdout or max(1, round(HOLDOUT_SHARE * len(recipe.open_training())))
        return JUDGES[recipe.probe.name], (*common, f"data.holdout={holdout}")

    def _variants(self) -> Iterator[tuple[str, ...]]:
        choices = []
        for text in self.vary:
            key, equals, values = text.partition("=")
            if not equals or not values:
                raise UserError(f"--vary {text!r}: give section.key=value,value")
            choices.append([f"{key}={value}" for value in values.split(",")])
        for chosen in itertools.product(*choices):
            load_any(self.source, (*self.overrides, *chosen))  # Says what is wrong before anything is run.
            yield chosen

    @property
    def lower_is_better(self) -> bool:
        """Whether the judge is a loss."""
        return self.judge.endswith("loss")

    def settings(self) -> list[Setting]:
        """All that may have to be run: of halving those at each share, of stages the most there can be."""
        found = [Setting(self._all_full(), varied, share) for share, varied in self._rungs()]
        most = 1 + (self.num_stages - 1) * (len(self.candidates) - 1)
        return found + [Setting(self._all_full())] * most

    def _all_full(self) -> tuple[int, ...]:
        return (self.full,) * self.num_stages

    def _rungs(self) -> Iterator[tuple[float, tuple[str, ...]]]:
        count = len(self.variants)
        rungs = max(1, (count - 1).bit_length())
        for rung in range(rungs if count > 1 else 0):
            for varied in self.variants[: -(-count // 2**rung)]:
                yield 0.5 ** (rungs - 1 - rung), varied

    def cost(self) -> tuple[int, float]:
        """The most runs that there can be, and their operations."""
        settings = self.settings()
        whole = plan_run(self._recipe(Setting(self._all_full()), self.recipe.seed)).total_flops
        return self.seeds * len(settings), self.seeds * whole * sum(setting.share for setting in settings)

    def _recipe(self, setting: Setting, seed: int) -> Recipe | FinetuneRecipe:
        assert self.recipe.budget_epochs is not None
        folder = self.output / f"{setting.name.replace('/', '_')}, seed {seed}"
        return load_any(
            self.source,
            (
                *self.overrides,
                *setting.varied,
                *self.judging,
                f"curriculum.stages={json.dumps(stages(setting.bandwidths))}",
                f"budget_epochs={self.recipe.budget_epochs * setting.share:g}",
                f"seed={seed}",
                f"output={folder}",
            ),
        )

    def tried(self, setting: Setting) -> Tried:
        """A setting's results; what is not recorded is run."""
        values = []
        for seed in range(self.recipe.seed, self.recipe.seed + self.seeds):
            recipe = self._recipe(setting, seed)
            name = f"{setting.name}, seed {seed}"
            key = f"{name}, {_digest(recipe)}"
            if key not in self.results:
                run = pretrain(recipe) if isinstance(recipe, Recipe) else finetune(recipe)
                found = [row[self.judge] for row in run.folder.metrics() if self.judge in row]
                assert found, f"{self.judge} is not among the results of {run.folder.path}"
                self.results[key] = found[-1]
                row = {"step": run.state.step, "key": key, "judge": self.judge, "value": found[-1]}
                append_line(self.output / TRIALS, json.dumps(row))
            self.say(f"{name}: {self.judge} {self.results[key]:.4g}")
            values.append(self.results[key])
        return Tried(setting, tuple(values))

    def read(self) -> None:
        """Take over what an earlier start has recorded."""
        file = self.output / TRIALS
        for line in file.read_bytes().splitlines() if file.is_file() else ():
            row = parse_row(line)
            if row is not None and row.get("judge") == self.judge:
                self.results[str(row["key"])] = float(row["value"])

    def best(self, tried: Sequence[Tried]) -> Tried:
        """The one with the best mean."""
        return (min if self.lower_is_better else max)(tried, key=lambda one: one.mean)


def _digest(recipe: Recipe | FinetuneRecipe) -> str:
    """Of all that a recipe says, so that no result of another one is taken for its own."""
    return hashlib.blake2b(recipe.model_dump_json().encode(), digest_size=4).hexdigest()


def chosen_bandwidths(text: str | None) -> tuple[int, ...] | None:
    """Those of `--bandwidths`.

    Raises:
        UserError: if they are not whole numbers.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--bandwidths {text!r}: give whole numbers, such as 96,160,224") from None


def stages(bandwidths: Sequence[int]) -> list[dict[str, Any]]:
    """Stages of equal compute as a recipe states them, equal neighbours merged."""
    merged = []
    for bandwidth, group in itertools.groupby(bandwidths):
        merged.append({"bandwidth": bandwidth, "share": round(len(list(group)) / len(bandwidths), 6)})
    merged[-1]["share"] = round(1 - sum(stage["share"] for stage in merged[:-1]), 6)
    return merged


def tune(search: Search) -> Tuned:
    """Search, and write the recipe that was found.

    Raises:
        UserError: for a mistake in recipe or data, labels that the judge needs included.
        Interrupted: after SIGTERM or SIGINT; the same command resumes.
    """
    search.output.mkdir(parents=True, exist_ok=True)
    search.read()
    runs, flops = search.cost()
    done = f", {len(search.results)} of them recorded" if search.results else ""
    search.say(f"at most {runs} runs{done}, {flops / 1e15:,.3g} PFLOP in all, judged by {search.judge}")
    decisions = list(_halving(search))
    varied = decisions[-1].taken.varied if decisions else search.variants[0]
    settled: tuple[int, ...] = ()
    full = search.tried(Setting(search._all_full(), varied))
    margin = search.margin
    if margin is None:
        margin = stdev(full.values) * (2 / len(full.values)) ** 0.5
    for stage in range(search.num_stages - 1):
        rest = (search.full,) * (search.num_stages - stage - 1)
        lowest = settled[-1] if settled else 0
        tried = [
            search.tried(Setting((*settled, bandwidth, *rest), varied))
            for bandwidth in search.candidates
            if bandwidth >= lowest
        ]
        best = search.best(tried)
        taken = next(one for one in tried if abs(one.mean - best.mean) <= margin)
        settled = taken.setting.bandwidths[: stage + 1]
        why = f"the smallest that is not worse than {best.mean:.4g} by more than {margin:.3g}"
        decisions.append(Decision(f"stage {stage + 1} of {search.num_stages}", tried, taken.setting, why))
        search.say(f"stage {stage + 1}: bandwidth {settled[-1]}, {why}")
    setting = Setting((*settled, search.full), varied)
    file = search.output / TUNED
    given = [text for text in search.overrides if not text.startswith("output=")]
    table = {"curriculum": {"name": "efficienttrain", "stages": stages(setting.bandwidths)}}
    comment = f"By `etpp tune`: {setting.name}, in {search.num_stages} stages of equal compute."
    write_text(file, extending(search.source, [*given, *varied], file, table, comment))
    return Tuned(decisions, search.judge, margin, setting, file)


def _halving(search: Search) -> Iterator[Decision]:
    """Settings beside the bandwidths, at full resolution."""
    left = search.variants
    for share in dict.fromkeys(share for share, _ in search._rungs()):
        tried = [search.tried(Setting(search._all_full(), varied, share)) for varied in left]
        tried.sort(key=lambda one: one.mean, reverse=not search.lower_is_better)
        left = [one.setting.varied for one in tried[: -(-len(tried) // 2)]]
        taken = search.best(tried).setting
        yield Decision(f"settings, {share:g} of the compute", tried, taken, "the best of them")
