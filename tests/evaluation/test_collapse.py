"""A classifier that answers without looking is told apart from one that is merely bad."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from etpp_ssl.evaluation.collapse import (
    Pace,
    Sign,
    collapse,
    is_due,
    sign_of_answers,
    sign_of_loss,
)

NAMES = ["oak", "yew", "elm", "fir"]


def kind(confusion: list[list[int]] | Tensor) -> str | None:
    sign = sign_of_answers(torch.as_tensor(confusion), NAMES)
    return None if sign is None else sign.kind


def test_one_answer_for_nearly_all_images_names_class_share_and_chance() -> None:
    sign = sign_of_answers(torch.tensor([[0, 30, 0, 0], [0, 30, 0, 0], [1, 28, 1, 0], [0, 10, 0, 0]]), NAMES)
    assert sign is not None
    assert sign.kind == "one class"
    assert sign.what == (
        "it predicts class 'yew' for 98 % of the 100 images, of which 30 % are of it (macro top-1 is 25.8 %, "
        "and guessing gives 25 %)"
    )


@pytest.mark.parametrize(
    "confusion",
    [
        pytest.param([[96, 0, 0, 0], [2, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], id="the data is that uneven"),
        pytest.param([[50, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], id="images of one class"),
        pytest.param([[5, 0, 0, 0], [5, 0, 0, 0], [4, 0, 0, 0], [4, 0, 0, 0]], id="too few images"),
        pytest.param([[20, 10, 10, 10]] * 2 + [[5, 5, 30, 10], [5, 5, 10, 30]], id="a bad classifier"),
        pytest.param(
            [[3, 2, 1, 0], [1, 3, 1, 1], [1, 1, 3, 1], [2, 0, 1, 3]], id="few images, twice the chance"
        ),
    ],
)
def test_others_have_not_collapsed(confusion: list[list[int]]) -> None:
    # The first of them does predict one class, but could hardly do better.
    found = kind(confusion)
    assert found in (None, "chance")
    assert found is None or confusion[0][0] == 96


def test_answers_that_follow_no_image_are_no_better_than_guessing() -> None:
    draw = torch.Generator().manual_seed(0)
    for answers in ([1, 1, 1, 1], [8, 1, 1, 0]):
        chances, found = torch.tensor(answers) / sum(answers), 0
        for _ in range(40):
            rows = [torch.bincount(chances.multinomial(n, True, generator=draw), minlength=4)
                    for n in (400, 80, 30, 90)]  # fmt: skip
            found += kind(torch.stack(rows)) == "chance"
        # Two standard deviations, of which one side counts: 98 %.
        assert found >= 36
    assert kind([[40, 60, 50, 50], [30, 80, 40, 50], [40, 40, 90, 30], [50, 50, 40, 60]]) is None


@pytest.mark.parametrize(
    ("loss", "found", "diverged"), [(2.29, True, False), (2.26, False, False), (9.0, True, True)]
)
def test_a_loss_is_compared_with_that_of_the_frequencies(loss: float, found: bool, diverged: bool) -> None:
    sign = sign_of_loss(loss, 2.3)
    assert (sign is not None) == found
    assert sign is None or sign.diverged == diverged
    # Nothing can be learnt from targets without entropy.
    assert sign_of_loss(loss, 0.0) is None


@pytest.mark.parametrize(
    ("step", "progress", "due"),
    [(14, 0.1, False), (14, 0.2, False), (21, 0.14, False), (22, 0.16, True), (144, 1.0, True)],
)
def test_it_is_due_a_tenth_after_the_warm_up_or_at_the_end(step: int, progress: float, due: bool) -> None:
    assert is_due(step, 144, progress, 0.05) == due
    assert is_due(3, 3, 1.0, 0.05)


def test_the_sentence_names_learning_rate_steps_and_warm_up_and_what_to_change() -> None:
    sign = Sign("chance", "it is no better than guessing")
    pace = Pace(peak_lr=1.25e-4, batch_size=64, num_steps=144, warmup_share=0.05)
    assert collapse(sign, pace) == (
        "the classifier has collapsed: it is no better than guessing. The learning rate reaches 0.000125 "
        "(optim.base_lr 0.0005 at batch_size 64) after 7 steps of warm-up, of 144 in all: raise "
        "optim.base_lr, for instance to 0.004, or the number of steps by budget_epochs; if the training "
        "loss rises instead, lower optim.base_lr, for instance to 6.3e-05, or raise optim.warmup_share"
    )
    diverged = collapse(Sign("loss", "x", diverged=True), pace)
    assert "in all: lower optim.base_lr, for instance to 6.3e-05" in diverged
    slow = Pace(1e-3, 256, 100, 0.6, slow_average=True)
    assert "or a smaller optim.warmup_share" in collapse(sign, slow)
    assert collapse(sign, slow).endswith("as the moving average that is evaluated is slower than the run")
