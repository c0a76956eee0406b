"""Says that a classifier has collapsed: that it answers without looking at the images.

A mean recall or a loss alone does not show it to somebody who does not know what guessing gives.

Legend: K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

FEWEST_IMAGES = 20
"""With fewer, guessing looks like anything."""
FEWEST_STEPS = 20
"""Before them no loss has left that of guessing."""
ONE_CLASS = 0.95
"""Share of the images with one answer that is a collapse."""
VERY_UNEVEN = 0.9
"""Share of the images that belong to one class, from which on that answer is a good one."""
LEARNT = 0.01
"""Share of the loss of guessing that a classifier has to be better by."""
STEP_UP = 8
"""How many times as high, or as low, a learning rate the advice names."""


class Sign(NamedTuple):
    """A sign of a collapse."""

    kind: Literal["one class", "chance", "loss"]
    what: str
    """The sign in words, of which a sentence begins."""
    diverged: bool = False
    """Whether the loss is clearly above that of guessing, as under too high a learning rate."""


@dataclass(frozen=True)
class Pace:
    """How a classifier is trained, as far as a collapse may come from it."""

    peak_lr: float
    """The schedule's highest learning rate."""
    batch_size: int
    num_steps: int
    warmup_share: float
    """Of the run's compute, in [0, 1)."""
    slow_average: bool = False
    """Whether a moving average is evaluated that remembers more steps than there were."""


def sign_of_answers(confusion: Tensor, names: Sequence[str]) -> Sign | None:
    """Whether the answers of an evaluation show a collapse.

    They do where one class is given to more than 95 % of the images, though the images are not of one class;
    and where macro top-1 is within two standard deviations of what the same answers, given without
    looking, would reach: at most 1 / K, whatever they are.

    Args:
        confusion: int64 (K, K), images by true class (row) and predicted class (column).
        names: of the classes; one that has none is called by its number.
    """
    counts = confusion.double()
    members, answers = counts.sum(1), counts.sum(0)
    total, known = float(members.sum()), members > 0
    num_classes = int(known.sum())
    if total < FEWEST_IMAGES or num_classes < 2:
        return None
    macro = float((counts.diagonal()[known] / members[known]).mean())
    beside = f"macro top-1 is {100 * macro:.3g} %, and guessing gives {100 / num_classes:.3g} %"
    share = answers / total
    most = int(share.argmax())
    own = float(members[most]) / total
    if float(share[most]) > ONE_CLASS and own < VERY_UNEVEN:
        name = repr(names[most]) if most < len(names) else str(most)
        return Sign(
            "one class",
            f"it predicts class {name} for {100 * float(share[most]):.3g} % of the {total:,.0f} images, of "
            f"which {100 * own:.3g} % are of it ({beside})",
        )
    spread = float((share * (1 - share))[known].div(members[known]).sum().sqrt()) / num_classes
    # Of few images even twice the chance may be chance: that is no finding.
    if macro <= (1 + 1e-9) / num_classes + min(2 * spread, 0.5 / num_classes):
        return Sign("chance", f"it is no better than guessing ({beside})")
    return None


def sign_of_loss(loss: float, frequency_loss: float) -> Sign | None:
    """Whether a training loss has not left that of guessing.

    Args:
        loss: mean cross-entropy of some steps, in nats.
        frequency_loss: what predicting the classes' frequencies for every image gives on the same targets,
            mixed, smoothed and weighted as they are.
    """
    if frequency_loss <= 0 or loss < (1 - LEARNT) * frequency_loss:
        return None
    what = (
        f"its training loss, {loss:.4g}, has not left that of predicting the classes' frequencies for "
        f"every image, {frequency_loss:.4g}"
    )
    return Sign("loss", what, diverged=loss > 1.1 * frequency_loss)


def is_due(step: int, num_steps: int, progress: float, warmup_share: float) -> bool:
    """Whether a run has had the time to learn something: a tenth of its compute after the warm-up, or all.

    Args:
        step: steps done.
        num_steps: of the run.
        progress: share of its compute that is spent.
        warmup_share: share of its compute that is warm-up.
    """
    return step >= num_steps or (step >= FEWEST_STEPS and progress >= warmup_share + 0.1)


def collapse(sign: Sign, pace: Pace) -> str:
    """A sentence on a collapse, and one on what to change."""
    base_lr = pace.peak_lr * 256 / pace.batch_size
    steps, warmup = pace.num_steps, round(pace.warmup_share * pace.num_steps)
    lower = f"lower optim.base_lr, for instance to {base_lr / STEP_UP:.2g}, or raise optim.warmup_share"
    if sign.diverged:
        advice = lower
    else:
        advice = (
            f"raise optim.base_lr, for instance to {base_lr * STEP_UP:.2g}, or the number of steps by "
            f"budget_epochs"
        )
        if 2 * warmup > steps:
            advice += " or a smaller optim.warmup_share"
        advice += f"; if the training loss rises instead, {lower}"
    if pace.slow_average and sign.kind != "loss":
        advice += (
            "; set optim.ema_warmup=true, as the moving average that is evaluated is slower than the run"
        )
    return (
        f"the classifier has collapsed: {sign.what}. The learning rate reaches {pace.peak_lr:.3g} "
        f"(optim.base_lr {base_lr:.3g} at batch_size {pace.batch_size}) after {warmup:,} steps of warm-up, "
        f"of {steps:,} in all: {advice}"
    )
