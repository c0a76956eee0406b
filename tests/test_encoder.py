"""The Python interface: what is opened, what comes out of it, and the sentences for what is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import TINY, TINY_CLASSIFIER

import etpp_ssl
from etpp_ssl.cli import main
from etpp_ssl.data.formats.base import Reading
from etpp_ssl.data.views import EvalView
from etpp_ssl.evaluation.features import read_embeddings
from etpp_ssl.model.encoders import encode_visible, encoder_of
from etpp_ssl.report.viewer import Viewer, images_of_files
from etpp_ssl.run_folder import RunFolder

SIZE = (16, 24)


def etpp(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert not stopped.value.code


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the shapes and modes that files come in."""
    root = tmp_path_factory.mktemp("images")
    (root / "train").mkdir()
    draw = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        return draw.integers(0, 256, shape, dtype=np.uint8)

    pictures: dict[str, Image.Image] = {
        "wide.png": Image.fromarray(values(20, 90, 3)),
        "tall.webp": Image.fromarray(values(80, 21, 3)),
        "gray.png": Image.fromarray(values(40, 40)),
        "alpha.png": Image.fromarray(values(33, 31, 4), "RGBA"),
        "pixel.png": Image.fromarray(values(1, 1, 3)),
        "deep.png": Image.fromarray(draw.integers(0, 65536, (30, 30), dtype=np.uint16)),
        "palette.gif": Image.fromarray(values(30, 40)).convert("P"),
        "print.jpg": Image.fromarray(values(30, 40, 4), "CMYK"),
    }
    for name, picture in pictures.items():
        picture.save(root / "train" / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(values(24, 48, 3)).save(root / "train" / "turned.jpg", exif=turned, quality=95)
    np.save(root / "train" / "array.npy", values(18, 25, 3))
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    etpp_ssl.pretrain(etpp_ssl.Recipe.parse(TINY, [f"output={folder}", "budget_epochs=0.5"]))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    etpp_ssl.finetune(
        etpp_ssl.FinetuneRecipe.parse(TINY_CLASSIFIER, [f"output={folder}", "budget_epochs=0.5"])
    )
    return folder


@pytest.mark.parametrize(("precision", "pool"), [("fp32", None), ("bf16", "avg")])
def test_features_are_those_of_etpp_embed(
    run: Path, images: Path, tmp_path: Path, precision: Any, pool: Any
) -> None:
    out = tmp_path / "features.safetensors"
    keys = ("data=folder", f"data.root={images}", "data.labels=none", f"precision={precision}")
    options = ["--batch-size=4", *([f"--pool={pool}"] if pool else [])]
    if precision != "fp32":
        # Whatever the run was trained in, features are an export's unless other ones are asked for.
        etpp("embed", run, *keys, f"--out={out}", *options)
        exact = etpp_ssl.load(run)
        files = [images / "train" / Path(name).name for name in read_embeddings(out).names]
        assert torch.equal(exact.embed(files, pool=pool, batch_size=4), read_embeddings(out).rows.features)
        options.append(f"--precision={precision}")
    etpp("embed", run, *keys, f"--out={out}", *options)
    written = read_embeddings(out)
    assert len(written.names) == 10
    encoder = etpp_ssl.load(run, precision=precision)
    files = [images / "train" / Path(name).name for name in written.names]
    features = encoder.embed(files, pool=pool, batch_size=4)
    assert torch.equal(features, written.rows.features)
    # Seen on every CPU so far, promised of none: neighbours in a batch change not even the last bit.
    torch.testing.assert_close(encoder.embed(files, pool=pool), features)
    assert not features.is_inference()


def test_paths_pictures_arrays_and_tensors_are_the_same_images(run: Path, images: Path) -> None:
    encoder = etpp_ssl.load(str(run))
    file = images / "train" / "wide.png"
    picture = Image.open(file)
    array = np.asarray(picture)
    shown = encoder.transform(str(file))
    assert shown.shape == (3, *SIZE)
    assert shown.dtype == torch.float32
    mixed = [str(file), file, picture, array, (array.astype(np.uint16) << 8) | 7, shown, shown.double()]
    features = encoder.embed(mixed)
    assert features.shape == (7, encoder.num_features)
    assert (features == features[0]).all()
    for several in (iter(mixed[:2]), torch.stack([shown, shown]), np.stack([array, array])):
        assert torch.equal(encoder.embed(several), features[:2])
    for one in (str(file), picture, array, shown):
        assert torch.equal(encoder.embed(one), features[:1])
    assert torch.equal(encoder.model(shown[None]), features[:1])
    expected = timm.data.create_transform(
        (3, 16, 16), interpolation="bicubic", mean=encoder.mean, std=encoder.std, crop_pct=encoder.crop_pct
    )(picture)
    assert (encoder.transform(file, size=16) - expected).abs().max() < 1e-5


def test_maps_at_any_size_are_what_the_model_computes_there(run: Path, images: Path) -> None:
    encoder, file = etpp_ssl.load(run), images / "train" / "wide.png"
    own = encoder.patches(file)
    assert own.shape == (4, 6, encoder.num_features)
    assert torch.equal(encoder.patches(encoder.transform(file)), own)
    torch.testing.assert_close(own.flatten(0, 1).mean(0), encoder.embed(file, pool="avg")[0])
    recipe = RunFolder(run).recipe()
    model = recipe.build_model().eval()
    checkpoint = RunFolder(run).newest(print)
    assert checkpoint is not None
    model.load_state_dict(checkpoint.model())
    for size in ((32, 20), (4, 4), (16, 48)):
        shown = encoder.transform(file, size)
        grid = (size[0] // 4, size[1] // 4)
        everything = torch.arange(grid[0] * grid[1])[None]
        table = encoder_of(model.encoder).sincos_at(grid)
        expected = encode_visible(model.encoder, shown[None], everything, positions=table)
        for found in (encoder.patches(file, size), encoder.patches(shown[None])):
            torch.testing.assert_close(found, expected[0, 1:].unflatten(0, grid))
    assert not encoder.patches(file).is_inference()


def test_a_classifier_gives_what_its_head_reads(classifier: Path, images: Path, tmp_path: Path) -> None:
    etpp("export", classifier, f"--out={tmp_path / 'timm'}")
    encoder, exported = etpp_ssl.load(classifier), etpp_ssl.load(tmp_path / "timm")
    stock = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    shown = encoder.transform(images / "train" / "gray.png")
    checkpoint = RunFolder(classifier).newest(print)
    assert checkpoint is not None
    assert (checkpoint.path / "ema.safetensors").is_file()
    for opened in (encoder, exported):
        assert type(opened.model) is type(stock)
        assert opened.classes == checkpoint.state()["classes"]
        assert torch.equal(opened.model(shown[None]), stock(shown[None]))
        features = opened.embed(shown)
        assert torch.equal(stock.head(features), stock(shown[None]))
    larger = encoder.transform(images / "train" / "gray.png", (32, 24))
    torch.testing.assert_close(encoder.patches(larger), exported.patches(larger))
    torch.testing.assert_close(encoder.embed(larger), exported.embed(larger))


@pytest.mark.parametrize("crop", ["fourier", "lanczos"])
def test_reconstructions_are_those_of_etpp_reconstruct(
    run: Path, images: Path, tmp_path: Path, crop: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    text = (folder / "recipe.yaml").read_text().replace("crop: fourier", f"crop: {crop}")
    (folder / "recipe.yaml").write_text(text)
    file = images / "train" / "turned.jpg"
    viewer = Viewer.of_run(RunFolder(folder), seed=5)
    viewer.load(RunFolder(folder).trained(print))
    view = EvalView(SIZE, crop_pct=0.875)
    (given,) = images_of_files([file], 1, view=view, reading=Reading(3, 10**6))
    expected = viewer.look(given, (8, 12))
    shown = etpp_ssl.load(folder).reconstruct(file, bandwidth=(8, 12), seed=5)
    assert shown.loss == expected.reconstruction.loss
    for array in (shown.image, shown.masked, shown.reconstruction):
        assert array.shape == (8, 12, 3)
        assert array.dtype == np.float32
        assert 0 <= array.min() <= array.max() <= 1
    drawn = np.round(255 * shown.reconstruction).astype(np.uint8)
    np.testing.assert_array_equal(drawn, expected.predictions[0].picture)
    np.testing.assert_array_equal(shown.image[~shown.hidden], shown.reconstruction[~shown.hidden])
    assert (shown.masked[shown.hidden] == 0.5).all()
    assert shown.hidden.mean() == pytest.approx(4 / 6)
    assert repr(shown).startswith("Reconstructed(8x12 px, 67% hidden")


def test_exports_and_files_give_the_bits_of_their_run(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    keys = ["image_size=32", "model.patch_size=8", "model.embed_dim=192", "model.num_heads=3"]
    decoder = ["model.decoder.embed_dim=32", "model.decoder.num_heads=16", "curriculum=constant"]
    etpp_ssl.pretrain(etpp_ssl.Recipe.parse(TINY, [f"output={folder}", "budget_epochs=0.2", *keys, *decoder]))
    encoder, file = etpp_ssl.load(folder), images / "train" / "wide.png"
    features = encoder.embed(file)
    expected = encoder.reconstruct(file, 16, seed=1)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    for other in (checkpoint, checkpoint / "model.safetensors"):
        assert torch.equal(etpp_ssl.load(other).embed(file), features)
    for target in ("timm", "mae", "transformers"):
        etpp("export", folder, "--to", target)
        opened = etpp_ssl.load(folder / "export" / target)
        assert torch.equal(opened.embed(file), features)
        assert torch.equal(opened.patches(file, (64, 40)), encoder.patches(file, (64, 40)))
        if target == "timm":
            with pytest.raises(etpp_ssl.UserError, match="has no decoder to reconstruct with"):
                opened.reconstruct(file)
        else:
            np.testing.assert_array_equal(opened.reconstruct(file, 16, seed=1).reconstruction, expected[2])
    weights = etpp_ssl.load(folder / "export" / "mae" / "model.pth")
    assert torch.equal(weights.embed(file), features)
    assert any("mean [0.485, 0.456, 0.406]" in note for note in weights.notes)


def test_weights_of_a_named_model_and_names_of_timm(images: Path, tmp_path: Path) -> None:
    file = images / "train" / "wide.png"
    net = timm.create_model("test_resnet", num_classes=7, in_chans=1).eval()
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    encoder = etpp_ssl.load(tmp_path / "weights.safetensors", model="test_resnet")
    assert encoder.in_chans == 1
    shown = encoder.transform(file)
    expected = net.forward_head(net.forward_features(shown[None]), pre_logits=True)
    assert torch.equal(encoder.embed(file), expected)
    with pytest.raises(
        etpp_ssl.UserError, match=r"of a timm model, give its name: load\(\.\.\., model=NAME\)"
    ):
        etpp_ssl.load(tmp_path / "weights.safetensors")
    for name in ("test_vit", "test_convnext", "test_resnet"):
        named = etpp_ssl.load(name, pretrained=False)
        assert named.image_size == (160, 160)
        assert named.embed(file).shape == (1, named.num_features)
        assert named.patches(file, (64, 96)).shape[:2] == (
            64 // named.patch_size[0],
            96 // named.patch_size[1],
        )
    assert "random weights" in repr(named)
    with pytest.raises(etpp_ssl.UserError, match="pool is avg, but a ResNet has its own"):
        named.embed(file, pool="avg")


BAD_SOURCES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda at: 3, "load takes a path or the name of a timm model; this is of type int"),
    (lambda at: at / "nowhere", "nowhere' does not exist, and timm has no model of that name"),
    (lambda at: "vit_bas_patch16_224", "close names: vit_base_patch16_224"),
    (lambda at: at / "empty", "empty' is neither a run nor an export: it has no recipe.yaml, and no model"),
    (lambda at: at / "short.safetensors", "is neither safetensors nor a file of torch.save"),
    (lambda at: at / "short.pth", "cannot be read as a file of torch.save"),
    (lambda at: at / "text.json", "is neither safetensors nor a file of torch.save"),
    (lambda at: at / "odd", "cannot be opened"),
    (lambda at: at / "cut", "config.json' cannot be read as JSON"),
    (lambda at: at / "fresh", "fresh' has no checkpoint yet"),
]


@pytest.mark.parametrize(("source", "words"), BAD_SOURCES, ids=[words[:30] for _, words in BAD_SOURCES])
def test_what_cannot_be_opened_is_told_in_a_sentence(
    run: Path, tmp_path: Path, source: Callable[[Path], Any], words: str
) -> None:
    for name in ("empty", "odd", "cut", "fresh"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.json").write_text("{}")
    checkpoint = RunFolder(run).trained(print)
    weights = (checkpoint.path / "model.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(weights[:-9])
    torch.save(load_file(checkpoint.path / "model.safetensors"), tmp_path / "whole.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:900])
    for name, config in (("odd", '{"architecture": "test_vit", "model_args": {"depth": "x"}}'), ("cut", "{")):
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "config.json").write_text(config)
    shutil.copy(run / "recipe.yaml", tmp_path / "fresh" / "recipe.yaml")
    with pytest.raises(etpp_ssl.UserError) as told:
        etpp_ssl.load(source(tmp_path))
    assert words in str(told.value)
    assert "\n" not in str(told.value)


BAD_CALLS: list[tuple[Callable[[etpp_ssl.Encoder, Path], object], str]] = [
    (lambda e, at: e.embed([]), "there is no image to embed"),
    (lambda e, at: e.embed(None), "images is of type NoneType; an image is a path"),
    (lambda e, at: e.embed([3]), "image 0 is of type int; an image is a path"),
    (lambda e, at: e.embed([at / "no.png"]), "no.png' cannot be read: No such file"),
    (lambda e, at: e.embed(at), "cannot be read: Is a directory"),
    (lambda e, at: e.embed([at / "text.png"]), "text.png' cannot be read: it is in no known image format"),
    (lambda e, at: e.embed(np.zeros((4, 4, 5), np.uint8)), "its shape is (4, 4, 5), not (height, width, 3)"),
    (lambda e, at: e.embed([np.zeros((4, 4, 3))]), "image 0 cannot be read: its values are float64"),
    (
        lambda e, at: e.embed(torch.zeros(2, 1, 16, 24)),
        "is a tensor (1, 16, 24); the encoder takes (3, H, W)",
    ),
    (lambda e, at: e.embed(torch.zeros(3, 16, 24, dtype=torch.uint8)), "image 0 is a tensor of uint8"),
    (lambda e, at: e.embed([torch.zeros(3, 16, 24), torch.zeros(3, 8, 8)]), "images of 16x24 and 8 px"),
    (lambda e, at: e.embed(torch.zeros(3, 15, 24)), "nearest legal sizes are 12x24 and 16x24"),
    (lambda e, at: e.embed(torch.zeros(3, 16, 24), pool="max"), "pool is 'max'; valid are"),
    (lambda e, at: e.embed(torch.zeros(3, 16, 24), batch_size=0), "batch_size is 0"),
    (lambda e, at: e.patches(torch.zeros(3, 2, 30)), "nearest legal sizes are 4x28 and 4x32"),
    (lambda e, at: e.patches(at / "text.png", 30), "nearest legal sizes are 28 and 32"),
    (lambda e, at: e.patches(at / "text.png", "30"), "size is '30'; give (height, width)"),
    (lambda e, at: e.patches(torch.zeros(2, 3, 16, 24)), "image 0 is a tensor (2, 3, 16, 24)"),
    (lambda e, at: e.reconstruct(torch.zeros(3, 16, 24), 96), "bandwidth 96 does not serve"),
    (lambda e, at: e.reconstruct(torch.zeros(3, 8, 8), 8), "the tensor is (3, 8, 8); to be reconstructed"),
]


@pytest.mark.parametrize(("call", "words"), BAD_CALLS, ids=[words[:30] for _, words in BAD_CALLS])
def test_what_an_encoder_does_not_take_is_told_in_a_sentence(
    run: Path, tmp_path: Path, call: Callable[[etpp_ssl.Encoder, Path], object], words: str
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(etpp_ssl.UserError) as told:
        call(etpp_ssl.load(run), tmp_path)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_channels_that_an_encoder_lacks_are_refused_and_named(images: Path, tmp_path: Path) -> None:
    keys = ["in_chans=5", "target=hog", "target.cell=4", "budget_epochs=0.2", f"output={tmp_path / 'run'}"]
    etpp_ssl.pretrain(etpp_ssl.Recipe.parse(TINY, keys))
    encoder = etpp_ssl.load(tmp_path / "run")
    with pytest.raises(
        etpp_ssl.UserError, match=r"wide\.png' cannot be read: it has 3 channels, but in_chans is 5"
    ):
        encoder.embed(images / "train" / "wide.png")
    five = np.zeros((20, 30, 5), np.uint8)
    assert encoder.embed(five).shape == (1, 16)
    with pytest.raises(etpp_ssl.UserError, match="the model predicts hog, which is not pixels"):
        encoder.reconstruct(five)


def test_importing_the_package_imports_nothing_else() -> None:
    code = """
import sys, etpp_ssl
heavy = {"torch", "numpy", "PIL", "timm", "pydantic", "yaml", "etpp_ssl.config"} & set(sys.modules)
assert not heavy, heavy
assert set(etpp_ssl.__all__) <= set(dir(etpp_ssl))
try:
    etpp_ssl.lod
except AttributeError as error:
    assert "no attribute 'lod'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recipes_are_read_by_their_class(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(TINY)
    assert etpp_ssl.Recipe.load(file, ["budget_epochs=2"]).budget_epochs == 2
    with pytest.raises(etpp_ssl.UserError, match="is of task pretrain"):
        etpp_ssl.FinetuneRecipe.load(file)
    for name in etpp_ssl.__all__:
        assert getattr(etpp_ssl, name) is not None


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    keys = [f"output={tmp_path / 'run'}", "budget_epochs=0.5", "checkpoint.every_steps=1"]
    etpp_ssl.pretrain(etpp_ssl.Recipe.parse(TINY, keys))
    newest, before = RunFolder(tmp_path / "run").checkpoints()
    (newest.path / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="falling back to the one before") as warned:
        encoder = etpp_ssl.load(tmp_path / "run")
    assert warned[0].filename == __file__
    assert f"step {before.step} of run" in repr(encoder)
    with pytest.raises(etpp_ssl.UserError, match=r"is damaged: model\.safetensors has 0 bytes"):
        etpp_ssl.load(newest.path)
