"""`etpp report`: one page that is whole, valid and complete, for runs in any state."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etpp_ssl.cli import main
from etpp_ssl.report import markup
from etpp_ssl.report.history import read_histories
from etpp_ssl.report.page import page, spread, write_report
from etpp_ssl.report.results import best_results, result_tables

VOID = {"meta", "br", "img", "input", "link", "hr"}
SECTIONS = ["summary", "curves", "curriculum", "reconstructions", "results", "environment", "recipe"]


class Outline(HTMLParser):
    """Checks that tags nest, and collects ids, links and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.images = 0
        self.drawings = 0
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(str(values["id"]))
        self.references += [str(values[key]) for key in ("href", "src", "xlink:href") if key in values]
        self.images += tag == "img"
        self.drawings += tag == "svg"
        assert tag not in ("script", "link", "iframe", "object")
        if tag == "img":
            assert values["alt"]
        if tag == "svg":
            assert values["aria-label"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(file: Path) -> Outline:
    text = file.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|url\((?!#)|@import", text)
    read = Outline()
    read.feed(text)
    read.close()
    assert read.open == []
    assert len(read.ids) == len(set(read.ids))
    for reference in read.references:
        assert reference.startswith("data:image/png;base64,") or reference.removeprefix("#") in read.ids
    return read


def test_a_page_about_one_run_has_everything(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_exits_well("report", run)
    file = Path(capsys.readouterr().out.strip())
    assert file == run / "report" / "index.html"
    read = outline(file)
    assert [key for key in read.ids if key in SECTIONS] == SECTIONS
    assert "differences" not in read.ids
    # Five quantities and a probe over three axes, and the plan.
    assert read.drawings == 3 * 6 + 1
    # Three bandwidths; four images: whole, masked, three checkpoints, leaking.
    assert read.images == 3 + 4 * 6
    for words in ("heldout_loss", "torch", "12x16", "leaks the answer", "3 of the 3 checkpoints", "base_lr"):
        assert words in read.text
    assert not list(file.parent.glob(".writing*"))


def test_runs_are_laid_side_by_side(trained_run: Callable[[str], Path], tmp_path: Path) -> None:
    runs = [trained_run(kind) for kind in ("normalised", "plain pixels, one channel", "five channels")]
    file = write_report(runs, tmp_path / "new" / "page.html", say=lambda _: None)
    read = outline(file)
    assert "differences" in read.ids
    for words in (*(folder.name for folder in runs), "in_chans", "false colour", "shown in grey"):
        assert words in read.text.lower()


def cut(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: len(text.splitlines()[0]) + 30])


def remove_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def remove_log(run: Path) -> None:
    (run / "metrics.jsonl").unlink()


def damage_a_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "step-00000006" / "model.safetensors").write_bytes(b"no")


def move_the_data(run: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    data = text[text.index("data:\n") : text.index("curriculum:\n")]
    (run / "recipe.yaml").write_text(text.replace(data, "data: {name: folder, root: /not/<here>}\n"))


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([cut, remove_checkpoints], ["not finished", "there is no checkpoint yet"]),
        ([remove_log, damage_a_checkpoint], ["nothing is logged yet", "step-00000006 is damaged"]),
        ([remove_log, remove_checkpoints, move_the_data], ["not started", "the stages are not known"]),
        ([move_the_data], ["not shown: data.root '/not/<here>' does not exist."]),
    ],
)
def test_a_run_in_any_state_has_a_page(
    states: list[Callable[[Path], None]], words: list[str], run: Path
) -> None:
    for change in states:
        change(run)
    text = outline(write_report([run], say=lambda _: None)).text.lower()
    for word in words:
        assert word in text


def test_a_broken_run_beside_a_sound_one(run: Path, trained_run: Callable[[str], Path]) -> None:
    remove_log(run)
    remove_checkpoints(run)
    move_the_data(run)
    read = outline(write_report([run, trained_run("five channels")], say=lambda _: None))
    assert "run: nothing is logged yet" in read.text
    assert read.drawings == 3 * 5 + 1


def test_a_page_about_several_runs_leaves_that_of_the_first_one(run: Path) -> None:
    own = write_report([run], say=lambda _: None)
    before = own.read_bytes()
    shutil.copytree(run, run.parent / "other")
    both = write_report([run, run.parent / "other"], say=lambda _: None)
    assert both == run / "report" / "comparison.html"
    assert own.read_bytes() == before


def test_a_run_in_progress_may_remove_checkpoints_while_it_is_read(run: Path) -> None:
    remove_log(run)
    histories = read_histories([run], print)
    shutil.rmtree(histories[0].checkpoints[0].path)
    said: list[str] = []
    assert "predicted by 2 of the 3 checkpoints" in page(histories, said.append)
    assert "has removed its checkpoint of step 2" in said[0]
    remove_checkpoints(run)
    assert "The run has removed its checkpoints meanwhile." in page(histories, said.append)


def test_pictures_of_checkpoints_that_are_gone_are_taken_from_what_was_saved(run: Path) -> None:
    remove_log(run)
    saved = run / "report" / "reconstruction"
    saved.mkdir(parents=True)
    for step in (1, 6):
        for number in range(2):
            Image.new("RGB", (5, 4), (step, number, 0)).save(saved / f"step-{step:08d}_{number:06d}_x.png")
    text = write_report([run], say=lambda _: None).read_text()
    assert "1 of 1 earlier steps, saved by etpp reconstruct" in text
    assert 'alt="reconstruction at step 1"' in text
    assert 'alt="reconstruction at step 6"' not in text


def test_names_and_recipes_are_text_and_not_markup(run: Path) -> None:
    remove_log(run)
    odd = run.parent / "<b>&amp;\"'"
    run.rename(odd)
    shutil.copytree(odd, run)
    read = outline(write_report([odd, run], say=lambda _: None))
    assert "<b>&amp;\"'" in read.text


def test_probes_of_other_weights_are_told_by_what_was_loaded_and_a_collapse_beside_the_summary(
    run: Path,
) -> None:
    remove_log(run)
    (run / "report").mkdir(exist_ok=True)
    (run / "report" / "probes.jsonl").write_text(
        '{"step": 6, "knn_top1": 51.25}\n{"init": "theirs.pth", "knn_top1": 49.75}\n'
    )
    kept = run / "report" / "evaluation" / "eval" / "evaluation.json"
    kept.parent.mkdir(parents=True)
    kept.write_text('{"protocol": {}, "numbers": {"top1": 10}, "collapse": "it has collapsed"}')
    text = outline(write_report([run], say=lambda _: None)).text
    cells = r"by etpp probe\s+weightsprotocolknn_top1\s+6probe51\.25\s+theirs\.pthprobe49\.75\s"
    assert re.search(cells, text)
    assert "run: warning: it has collapsed" in text


def test_the_summary_shows_the_best_of_each_protocol_and_long_settings_are_folded(run: Path) -> None:
    remove_log(run)
    (run / "report").mkdir(exist_ok=True)
    images = {"data": "folder", "root": "/photos/val", "split": "eval", "holdout": 0, "num_images": 9}
    other = {**images, "root": "/photos/test", "trained_on": 0}
    seen = {**images, "root": "/photos/train", "trained_on": 9}
    long = {"base_lrs": list(range(100))}
    rows = [(2, 20, images, 40.0), (4, 20, images, 61.5), (6, 20, images, 60.0), (6, 5, images, 33.0),
            (6, 20, other, 30.0), (6, 20, seen, 99.0)]  # fmt: skip
    lines = [
        {"step": step, "protocol": {"name": "knn", "k": k, **long}, "data": data, "knn_top1": top1}
        for step, k, data, top1 in rows
    ]
    (run / "report" / "probes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (history,) = read_histories([run], lambda _: None)
    (best,) = best_results([history])
    assert best == {
        "best knn_top1 (k 20, root val)": "61.5 (step 4); last 60 (step 6)",
        "best knn_top1 (k 5, root val)": "33 (step 6)",
        "best knn_top1 (k 20, root test)": "30 (step 6)",
        "best knn_top1 (k 20, root train), training images": "99 (step 6)",
    }
    (found,) = result_tables([history])
    assert max(len(cell) for row in found.table.rows for cell in row) < 60
    assert all("97, 98, 99]" in settings for settings in found.settings.values())
    page = write_report([run], say=lambda _: None).read_text()
    assert re.search(r"<details><summary>settings and images</summary>.*97, 98, 99]", page, re.DOTALL)


def test_what_a_log_says_is_text_and_not_markup(run: Path) -> None:
    odd = "</td></pre><script>'\"\\g<0>&lt;"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{**line, f"loss_{odd}": 0.5, odd: 2.0} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "report").mkdir(exist_ok=True)
    later = {"init": odd, f"top {odd}": 51.25, "protocol": {f"key {odd}": odd}}
    (run / "report" / "probes.jsonl").write_text(json.dumps(later) + "\n")
    text = outline(write_report([run], say=lambda _: None)).text
    # The label of the curves, a probe during training, one by etpp probe, and its protocol.
    for words in (f"part of the loss: {odd}", f"last {odd}", f"top {odd}", f"key {odd} {odd}"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/nowhere"], "is not a run folder: it does not exist"),
        (["{run}", "{tmp}"], "is not a run folder: it has no recipe.yaml"),
        (["{run}/recipe.yaml"], "is not a run folder: it is a file"),
        (["{run}", "--out", "{run}/recipe.yaml/page.html"], "page.html' cannot be written"),
        (["{run}", "--out", "{run}"], "run' is a folder; give the name of a file in it"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], words: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its figures take time, and are not what is written.
    remove_log(run)
    with pytest.raises(SystemExit) as done:
        main(["report", *(argument.format(tmp=tmp_path, run=run) for argument in arguments)])
    assert done.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("etpp: error: ")
    assert words in last
    assert not list(tmp_path.rglob(".writing*"))


def test_an_image_carries_its_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    coded = re.search(r'base64,([^"]*)"', markup.image(pixels, "noise"))
    assert coded is not None
    np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(coded[1]))), pixels)


@pytest.mark.parametrize("length", [1, 2, 5, 6, 40])
def test_a_spread_keeps_first_and_last(length: int) -> None:
    chosen = spread(list(range(length)), 5)
    assert len(chosen) == min(length, 5)
    assert (chosen[0], chosen[-1]) == (0, length - 1)
    assert chosen == sorted(set(chosen))


def main_exits_well(*arguments: object) -> None:
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert not done.value.code
