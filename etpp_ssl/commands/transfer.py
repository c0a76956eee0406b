"""`etpp transfer`: every usual protocol for an encoder on labelled images, from kNN to fine-tuning.

The fine-tuning run is an ordinary one; what the other protocols found stands in its `report/transfer.json`,
so that the same command resumes after whatever was done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from etpp_ssl.cli_end import is_one_of_several
from etpp_ssl.commands.transfer_recipe import RECIPE
from etpp_ssl.config import UserError
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.splits import TRAINING, check_labels, with_classes
from etpp_ssl.data.views import EvalView
from etpp_ssl.dist.accelerator import open_accelerator, process_as_found
from etpp_ssl.evaluation.attentive import AttentiveConfig, AttentiveProbe
from etpp_ssl.evaluation.base import ProbeContext
from etpp_ssl.evaluation.classification import accuracy
from etpp_ssl.evaluation.feature_cache import kept_features, state_key
from etpp_ssl.evaluation.features import Features
from etpp_ssl.evaluation.knn import TEMPERATURE, knn_sweep
from etpp_ssl.evaluation.linear_cached import LinearCachedConfig, fit_head
from etpp_ssl.evaluation.measured_on import in_words, measured_on, without_looking
from etpp_ssl.evaluation.predictions import Example, confusion_of, most_sure, predict
from etpp_ssl.files import write_text
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import RunFolder, read_object
from etpp_ssl.tasks.classify import Classification
from etpp_ssl.train.launch import finetune
from etpp_ssl.train.run import Run
from etpp_ssl.train.start import starting_point

STATE = "transfer.json"
MAX_BYTES = 1 << 20
KS = (5, 10, 20, 50)
"""Neighbours that the holdout chooses among."""
MOST_SHOWN = 12
"""Images that are recognised, and as many that are not, for the page."""
PROTOCOLS = {
    "knn": "kNN",
    "linear_cached": "linear head",
    "attentive": "attentive head",
    "finetune": "fine-tuning",
}
NOT_THE_RESULT: dict[str, Any] = {
    "output": True,
    "baseline_epochs": True,
    "log_every_steps": True,
    "peer_timeout_minutes": True,
    "checkpoint": True,
    "tracker": True,
    "data": {"num_images", "strict", "num_workers", "prefetch", "stall_seconds", "description"},
}
"""Keys that change no number."""


class Outcome(NamedTuple):
    """What a protocol comes to, accuracies in per cent."""

    protocol: str
    """A key of `PROTOCOLS`."""
    settings: str
    """What the holdout has chosen."""
    top1: float
    macro_top1: float
    """Mean over the classes."""
    holdout_top1: float
    seconds: float
    """Of fine-tuning with its trials; for one that was resumed, those of the last start, or those of its
    steps if they are more."""


@dataclass(frozen=True)
class Transferred:
    """The result of `etpp transfer`."""

    folder: Path
    """The fine-tuning run's."""
    outcomes: list[Outcome]
    data: dict[str, Any]
    """The images that the accuracies are of; see `etpp_ssl.evaluation.measured_on`."""
    without_looking: str
    """See there."""
    kept: str
    """Which weights the run has kept, and why, as a sentence."""
    classes: list[str]
    confusion: Tensor
    """int64 (K, K), of the weights that were kept."""
    right: list[Example]
    """Images that they recognise, those that they are most sure of first."""
    wrong: list[Example]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Statistics that the examples are normalised by."""

    @property
    def notes(self) -> list[str]:
        """What has to be known of the table, as sentences without a full stop."""
        caveat = ""
        if self.data["split"] == "holdout":
            caveat = "the settings were chosen on the same images: what is found is a little too good"
        notes = (f"images: {in_words(self.data)}", self.without_looking, caveat, self.kept)
        return [note for note in notes if note]

    @property
    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows for people."""
        head = ["protocol", "top-1 %", "macro top-1 %", "holdout top-1 %", "seconds", "chosen on the holdout"]
        rows = [
            [
                PROTOCOLS[outcome.protocol],
                f"{outcome.top1:.2f}",
                f"{outcome.macro_top1:.2f}",
                f"{outcome.holdout_top1:.2f}",
                f"{outcome.seconds:,.1f}",
                outcome.settings,
            ]
            for outcome in self.outcomes
        ]
        return head, rows


@process_as_found()
def transfer(recipe: FinetuneRecipe, say: Callable[[str], None]) -> Transferred:
    """Run all protocols, or those that an earlier start has not finished.

    Args:
        recipe: from `recipe_of`.
        say: told what each protocol comes to.

    Raises:
        UserError: for a mistake in recipe, data or folder.
        Interrupted: after SIGTERM or SIGINT while the run trains; see `etpp_ssl.train.launch`.
    """
    if is_one_of_several():
        raise UserError(
            f"etpp transfer runs in one process; several fine-tune by etpp finetune {RECIPE} "
            f"init={recipe.init} data.root=..."
        )
    if recipe.evaluate.repeats > 1:
        raise UserError(
            f"evaluate.repeats is {recipe.evaluate.repeats}, which fine-tuning alone can do: etpp finetune "
            f"{RECIPE} init={recipe.init} data.root=... evaluate.repeats={recipe.evaluate.repeats}"
        )
    accelerator = open_accelerator(recipe)
    folder = RunFolder(recipe.output)
    sources = _open(recipe)
    _check_folder(recipe, folder)
    outcomes = _frozen_outcomes(recipe, folder, accelerator, sources, say)
    say(f"{PROTOCOLS['finetune']}: {folder.path}, {recipe.budget_epochs or recipe.budget_hours:g} "
        f"{'epochs' if recipe.budget_epochs else 'hours'}")  # fmt: skip
    since = time.perf_counter()
    run = finetune(recipe)
    seconds = max(time.perf_counter() - since, run.state.elapsed)
    context = _context(recipe, accelerator, sources, folder, say)
    model = run.trained_model()
    found = {
        split: predict(context, model, sources[split], recipe.evaluate.batch_size)
        for split in dict.fromkeys(("holdout", _evaluation(recipe)))
    }
    evaluated, source = found[_evaluation(recipe)], sources[_evaluation(recipe)]
    num_classes = recipe.num_classes(sources["train"].classes)
    confusion = confusion_of(evaluated.labels, evaluated.predicted, num_classes)
    holdout = found["holdout"]
    numbers = accuracy("", evaluated.predicted == evaluated.labels, evaluated.labels)
    on_holdout = accuracy("", holdout.predicted == holdout.labels, holdout.labels)
    lr = run.recipe.optim.base_lr
    kept, settings = _kept(run, f"learning rate {lr:g}" if isinstance(lr, float) else "")
    tuned = Outcome("finetune", settings, **numbers, holdout_top1=on_holdout["top1"], seconds=seconds)
    mean, std = recipe.data.statistics(recipe.in_chans)
    return Transferred(
        folder.path,
        [*outcomes, tuned],
        measured_on(recipe, recipe.evaluate.split or "eval", source, [(recipe, None)]),
        without_looking(source),
        kept,
        sources["train"].classes or [],
        confusion,
        most_sure(context, source, evaluated, MOST_SHOWN, right=True),
        most_sure(context, source, evaluated, MOST_SHOWN, right=False),
        mean,
        std,
    )


def _evaluation(recipe: FinetuneRecipe) -> str:
    assert recipe.evaluate.split is not None
    return recipe.evaluate.split


def _open(recipe: FinetuneRecipe) -> dict[str, ImageSource]:
    """The images of each part, under the classes of training."""
    train = recipe.open_split("train")
    num_classes = recipe.num_classes(train.classes)
    sources = {split: recipe.open_split(split) for split in ("train", "holdout", _evaluation(recipe))}
    for split, source in sources.items():
        if split not in TRAINING and train.classes is not None:
            sources[split] = with_classes(source, train.classes)
        check_labels(source, num_classes)
    return sources


def _check_folder(recipe: FinetuneRecipe, folder: RunFolder) -> None:
    """See, before the work, that the run can start or resume there.

    Raises:
        UserError: if the folder holds something else, or a run of another recipe.
    """
    source = recipe.open_training()
    settled = recipe.for_images(len(source)).counted(source)
    if folder.exists():
        there = folder.any_recipe()
        if isinstance(there, FinetuneRecipe) and recipe.optim.base_lr == "auto":
            optim = settled.optim.model_copy(update={"base_lr": there.optim.base_lr})
            settled = settled.model_copy(update={"optim": optim})
    starting_point(settled, folder, source, settled.build_curriculum(len(source)), None, lambda _: None)


def _context(
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    sources: Mapping[str, ImageSource],
    folder: RunFolder,
    say: Callable[[str], None],
) -> ProbeContext:
    return ProbeContext(
        accelerator=accelerator,
        view=EvalView(recipe.size, recipe.data.crop_pct),
        normalise=recipe.normaliser(accelerator.device),
        num_workers=recipe.data.num_workers,
        stall_seconds=recipe.data.stall_seconds,
        open_split=lambda split: sources["train" if split == "train" else _evaluation(recipe)],
        objective=None,
        masker=None,
        seed=recipe.seed,
        folder=folder.path / "report",
        say=say,
    )


def _frozen_outcomes(
    recipe: FinetuneRecipe,
    folder: RunFolder,
    accelerator: Accelerator,
    sources: Mapping[str, ImageSource],
    say: Callable[[str], None],
) -> list[Outcome]:
    """Those of the protocols that leave the encoder as it is, each written down once it is done."""
    num_classes = recipe.num_classes(sources["train"].classes)
    model = freshly_initialised(recipe.seed, partial(recipe.build_model, num_classes))
    task = Classification(recipe, model, accelerator.device, num_classes)
    assert recipe.init is not None
    task.load_init(recipe.init, lambda _: None)  # The run tells it.
    task.model.to(accelerator.device)
    context = _context(recipe, accelerator, sources, folder, say)
    file = folder.path / "report" / STATE
    key = state_key(
        task.net,
        recipe=recipe.model_dump(mode="json", exclude=NOT_THE_RESULT),
        images={split: source.fingerprint() for split, source in sources.items()},
    )
    done = _read(file, key)
    frozen = _Frozen(recipe, task, context, sources, num_classes)
    for protocol, run in (
        ("knn", frozen.knn),
        ("linear_cached", frozen.linear),
        ("attentive", frozen.attentive),
    ):
        if protocol not in done:
            since = time.perf_counter()
            settings, answers = run()
            numbers = {split: accuracy("", chosen == true, true) for split, (true, chosen) in answers.items()}
            seconds = time.perf_counter() - since
            done[protocol] = Outcome(
                protocol,
                settings,
                **numbers[_evaluation(recipe)],
                holdout_top1=numbers["holdout"]["top1"],
                seconds=seconds,
            )
            values = {"key": key, "outcomes": [outcome._asdict() for outcome in done.values()]}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(values, indent=1) + "\n")
        found = done[protocol]
        say(
            f"{PROTOCOLS[protocol]}: {found.top1:.2f} % top-1, {found.holdout_top1:.2f} % on the holdout, "
            f"{found.seconds:,.1f} s"
        )
    return list(done.values())


def _read(file: Path, key: str) -> dict[str, Outcome]:
    """Outcomes of an earlier start, of the same weights, images and recipe; none where it cannot be read."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        values = read_object(file, MAX_BYTES)
        if values["key"] == key:
            return {row["protocol"]: Outcome(**row) for row in values["outcomes"]}
    return {}


Answers = dict[str, tuple[Tensor, Tensor]]
"""By split, labels and predicted classes of its images, int64 (n,) each."""


class _Frozen:
    """The protocols on an encoder as it stands; each gives what was chosen, and its answers."""

    def __init__(
        self,
        recipe: FinetuneRecipe,
        task: Classification,
        context: ProbeContext,
        sources: Mapping[str, ImageSource],
        num_classes: int,
    ) -> None:
        self.recipe = recipe
        self.task = task
        self.context = context
        self.sources = sources
        self.num_classes = num_classes
        self.tested = list(dict.fromkeys(("holdout", _evaluation(recipe))))
        self._features: dict[str, Features] = {}

    def features(self, split: str) -> Features:
        """As the run's own head will ask for them, from the same files."""
        if split not in self._features:
            source, folder = self.sources[split], self.context.folder
            found = kept_features(
                folder and folder / "features", self.context, self.task.net, source, range(len(source)),
                pool=None, batch_size=self.recipe.evaluate.batch_size, precision=None, say=lambda _: None,
            )  # fmt: skip
            if not len(found.labels):
                raise UserError(f"none of the {len(source)} {split} images can be read")
            self._features[split] = found
        return self._features[split]

    def knn(self) -> tuple[str, Answers]:
        """A vote of the k nearest training images."""
        train = self.features("train")
        pairs = [(k, TEMPERATURE) for k in KS]
        votes = {
            split: knn_sweep(
                train.features, train.labels, self.features(split).features,
                num_classes=self.num_classes, pairs=pairs,
            )
            for split in self.tested
        }  # fmt: skip
        right = (votes["holdout"] == self.features("holdout").labels).sum(dim=1).tolist()
        best = max(range(len(pairs)), key=right.__getitem__)
        return f"k {KS[best]}", {
            split: (self.features(split).labels.cpu(), vote[best].cpu()) for split, vote in votes.items()
        }

    def linear(self) -> tuple[str, Answers]:
        """A linear classifier, the head that fine-tuning begins with."""
        fitted = fit_head(
            LinearCachedConfig(),
            self.features("train"),
            self.features("holdout"),
            num_classes=self.num_classes,
            seed=self.recipe.seed,
        )
        answers = {}
        for split in self.tested:
            logits = fitted.heads.logits(fitted.scaled(self.features(split).features))[:, 0]
            answers[split] = (self.features(split).labels.cpu(), logits.argmax(dim=1).cpu())
        return f"learning rate {fitted.base_lr:g}, weight decay {fitted.weight_decay:g}", answers

    def attentive(self) -> tuple[str, Answers]:
        """Cross-attention pooling of the patch tokens."""
        probe = AttentiveProbe(AttentiveConfig(), self.context)
        head = probe.fit(self.task.model)
        answers = {}
        for split in self.tested:
            predicted, labels = probe.predicted(self.task.model, head, self.sources[split])
            answers[split] = (labels.cpu(), predicted.cpu())
        return "", answers


def _kept(run: Run, settings: str) -> tuple[str, str]:
    """Which weights a run has kept, as a sentence, and what the table says of its fine-tuning."""
    rows = [row for row in run.folder.metrics() if "start_kept" in row]
    if not rows:
        return "the fine-tuned weights are exported", settings
    row = rows[-1]
    numbers = (
        f"on the holdout fine-tuning is {row['holdout_top1']:.2f} %, the linear head that it began with "
        f"{row['start_holdout_top1']:.2f} %"
    )
    if row["start_kept"]:
        return f"the linear head is kept and exported: {numbers}", f"{settings}; worse: the head is kept"
    return f"the fine-tuned weights are kept and exported: {numbers}", settings


def print_transferred(transferred: Transferred, console: Console) -> None:
    """The table of protocols."""
    head, rows = transferred.table
    table = Table(box=box.SIMPLE, collapse_padding=True)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if 0 < number < len(head) - 1 else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
