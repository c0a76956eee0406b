"""The study of labels: what is run in which order, and what its table says."""

from __future__ import annotations

from pathlib import Path

import yaml
from study_labels import LabelStudy, runs_of, table

from etpp_ssl.recipe import load_any

FILE = Path(__file__).parents[2] / "tools" / "studies" / "labels" / "study.yaml"
STUDY = LabelStudy.model_validate(
    {
        "common": {"a": [], "b": []},
        "labels": {
            "a": {"1 %": {"overrides": [], "passes": 10, "seeds": [0, 1]}},
            "b": {"all": {"overrides": [], "passes": 2, "seeds": [3], "arms": ["tuned"]}},
        },
        "arms": {
            "linear": {"command": "probe", "number": "top1", "recipe": {"a": "x", "b": "y"}},
            "tuned": {"command": "finetune", "number": "top1", "recipe": {"a": "x", "b": "y"}},
        },
    }
)


def test_first_seeds_come_first_and_all_arms_of_a_seed_together() -> None:
    runs = list(runs_of(STUDY))
    assert [(run[0], *run[2:]) for run in runs] == [
        ("a", "linear", 0),
        ("a", "tuned", 0),
        ("b", "tuned", 3),
        ("a", "linear", 1),
        ("a", "tuned", 1),
    ]


def test_the_table_has_means_and_differences_paired_by_seed() -> None:
    tops = {"linear/seed0": 40.0, "linear/seed1": 42.0, "tuned/seed0": 43.0, "tuned/seed1": 47.0}
    rows = [{"key": f"a/1 %/{key}", "top1": top, "cpu_seconds": 90.0} for key, top in tops.items()]
    assert table(STUDY, rows).splitlines()[2:] == [
        "| a, 1 % | 10 | 41.0 ± 1.4, 1.5 min | 45.0 ± 2.8 (+4.0 ± 1.4), 1.5 min |",
        "| b, all | 2 |  |  |",
    ]


def test_the_file_and_its_recipes_are_valid() -> None:
    study = LabelStudy.model_validate(yaml.safe_load(FILE.read_text()))
    for dataset, arm in {(dataset, arm) for dataset, _, arm, _ in runs_of(study)}:
        chosen = study.arms[arm]
        fits = [text for text in chosen.overrides if not text.startswith("probe")]
        load_any(str(FILE.parents[3] / chosen.recipe[dataset]), fits)
