"""`etpp reconstruct`: PNG grids of any run, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.data.views import to_channels
from etpp_ssl.report.grid import DPI, enlargement, grid_figure, write_grids
from etpp_ssl.report.panels import Panel
from etpp_ssl.report.viewer import InputImage, Viewer, images_of_run
from etpp_ssl.run_folder import RunFolder

KINDS = ["normalised", "plain pixels, one channel", "five channels", "lanczos"]


def etpp(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as done:
        return int(done.code or 0)
    return 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_grid_per_image_for_any_run(
    kind: str, trained_run: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert etpp("reconstruct", trained_run(kind), "--out", tmp_path, "--count", 2) == 0
    printed = capsys.readouterr()
    files = [Path(line) for line in printed.out.splitlines()]
    assert len(files) == 2
    assert "2 images of the evaluation data" in printed.err
    for file in files:
        assert file.parent == tmp_path
        assert file.name.startswith(f"step-{RunFolder(trained_run(kind)).checkpoints()[0].step:08d}_")
        assert np.asarray(Image.open(file)).std() > 10


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_of_an_image(kind: str, trained_run: Callable[[str], Path]) -> None:
    folder = RunFolder(trained_run(kind))
    recipe = folder.recipe()
    viewer = Viewer.of_run(folder)
    viewer.load(folder.trained(print))
    (picture,), _ = images_of_run(folder, 1)
    shown = viewer.look(picture)
    sizes = list(dict.fromkeys(stage.bandwidth for stage in recipe.build_curriculum(64).stages))
    assert [panel.picture.shape[:2] for panel in shown.crops] == sizes
    assert sizes[-1] == recipe.size
    # The last crop is the image as a person would see it.
    image = picture.pixels.permute(1, 2, 0).numpy()
    expected = image[:, :, [0, 1, 2]] if recipe.in_chans != 1 else np.repeat(image, 3, axis=2)
    np.testing.assert_allclose(shown.crops[-1].picture.astype(int), expected.astype(int), atol=1)
    assert len(shown.predictions) == (2 if kind == "plain pixels, one channel" else 4)
    again = viewer.look(picture)
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(
        shown.predictions, again.predictions, strict=True))  # fmt: skip


def test_lanczos_runs_show_what_their_workers_made(trained_run: Callable[[str], Path]) -> None:
    folder = RunFolder(trained_run("lanczos"))
    (picture,), _ = images_of_run(folder, 1)
    viewer = Viewer.of_run(folder)
    small = to_channels(picture.pixels)[0].resize((12, 8), Image.Resampling.LANCZOS)
    shown = viewer.crops(picture)[0].picture
    np.testing.assert_allclose(shown.astype(int), np.asarray(small).astype(int), atol=1)
    fourier = replace(viewer, lanczos=False)
    assert not torch.allclose(viewer.crop(picture, (8, 12)), fourier.crop(picture, (8, 12)), atol=1e-2)


def test_options_choose_checkpoint_bandwidth_and_mask(run: Path, tmp_path: Path) -> None:
    steps = [checkpoint.step for checkpoint in RunFolder(run).checkpoints()]
    assert len(steps) == 3
    written = {
        "plain": write_grids(run, count=1),
        "older": write_grids(run, count=1, step=steps[-1]),
        "small": write_grids(run, count=1, bandwidth=(8, 12)),
        "seed": write_grids(run, count=1, seed=99, out=tmp_path / "new" / "seed"),
    }
    files = [file for files in written.values() for file in files]
    assert len(set(files)) == 4
    assert f"step-{steps[-1]:08d}_" in files[1].name
    assert "_at-8x12_" in files[2].name
    assert files[0].parent == run / "report" / "reconstruction"
    assert len({file.read_bytes() for file in files}) == 4


def test_files_and_folders_are_taken_in_order(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.new("RGB", (30, 40), (60 * number, 10, 90)).save(images / f"image {number}.png")
    Image.new("L", (9, 9), 200).save(tmp_path / "gray.jpg")
    said: list[str] = []
    files = write_grids(run, [tmp_path / "gray.jpg", images], count=3, say=said.append)
    assert said == [f"3 of the 4 images of '{images}'; --count takes more"]
    ends = [file.name.split("_", 1)[1] for file in files]
    assert ends == ["000000_gray.png", "000001_image-0.png", "000002_image-1.png", "000003_image-2.png"]


def test_training_images_are_shown_where_there_are_no_others(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "data"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (30, 40), (60 * number, 10, 90)).save(images / f"{number}.png")
    (images / "broken.png").write_bytes(b"no picture")
    text = (run / "recipe.yaml").read_text()
    before = text[text.index("data:\n") : text.index("curriculum:\n")]
    (run / "recipe.yaml").write_text(text.replace(before, f"data: {{name: folder, root: '{images}'}}\n"))
    said: list[str] = []
    assert len(write_grids(run, say=said.append)) == 3
    assert said == ["3 images of the training data"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/nowhere"], "is not a run folder: it does not exist"),
        (["{tmp}"], "is not a run folder: it has no recipe.yaml"),
        (["{run}", "{tmp}/nowhere.png"], "nowhere.png' does not exist"),
        (["{run}", "{tmp}/empty"], "empty' has no images in it"),
        (["{run}", "{tmp}/text.png"], "text.png' cannot be read: it is in no known image format"),
        (["{five}", "{tmp}/colour.png"], "colour.png' cannot be read: it has 3 channels, but in_chans is 5"),
        (["{run}", "--bandwidth", "10"], "bandwidth 10 does not serve"),
        (["{run}", "--bandwidth", "wide"], "bandwidth 'wide' is neither"),
        (["{run}", "--checkpoint", "3"], "has no checkpoint of step 3; there are 2, 4, 6"),
        (["{run}", "--out", "{tmp}/text.png"], "text.png/picture.png' cannot be written: Not a directory"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    words: str,
    run: Path,
    trained_run: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (20, 20)).save(tmp_path / "colour.png")
    places = {"tmp": tmp_path, "run": run, "five": trained_run("five channels")}
    assert etpp("reconstruct", *(argument.format(**places) for argument in arguments)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("etpp: error: ")
    assert words in last
    assert not (run / "report").exists()


def test_damaged_and_missing_checkpoints_are_named(run: Path) -> None:
    newest, *others = RunFolder(run).checkpoints()
    (newest.path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"is damaged: model\.safetensors has 0 bytes"):
        write_grids(run, step=newest.step)
    said: list[str] = []
    (file,) = write_grids(run, count=1, say=said.append)
    assert f"step-{others[0].step:08d}" in file.name
    assert "falling back" in said[0]
    viewer = Viewer.of_run(RunFolder(run))
    shutil.rmtree(others[0].path)
    with pytest.raises(UserError, match="cannot be read"):
        viewer.load(others[0])
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        write_grids(run)


@pytest.mark.parametrize("size", [(5, 9), (224, 224), (40, 300), (1, 1)])
def test_panels_are_drawn_pixel_for_pixel_and_captions_stay_apart(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    note = "brightness and contrast estimated from visible neighbours"
    panel, large = (
        Panel("masked input, bandwidth 160x224", note, pixels),
        Panel("glyphs", note, pixels, magnified=True),
    )
    times = enlargement(size)
    figure = grid_figure([[panel, large], [panel]], "a heading that says what is shown", times)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[:, :, :3]
    assert figure.dpi == DPI
    expected = pixels.repeat(times, axis=0).repeat(times, axis=1)
    for picture, wanted in zip(figure.images, (expected, pixels, expected), strict=True):
        left, bottom = int(picture.ox), int(picture.oy)
        top = drawn.shape[0] - bottom - wanted.shape[0]
        np.testing.assert_array_equal(
            drawn[top : top + wanted.shape[0], left : left + wanted.shape[1]], wanted
        )
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in figure.texts]
    for index, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_the_number_of_an_image_chooses_its_mask(trained_run: Callable[[str], Path]) -> None:
    folder = RunFolder(trained_run("normalised"))
    viewer = Viewer.of_run(folder)
    (picture,), _ = images_of_run(folder, 1)
    other = InputImage(picture.name, picture.number + 1, picture.pixels)
    masks = [viewer.look(shown).reconstruction.ids_keep.tolist() for shown in (picture, other)]
    assert masks[0] != masks[1]
