"""Data sets that `timm.data.create_dataset` opens and that can be addressed by index."""

from __future__ import annotations

import hashlib
import io
import os
from typing import Any, Literal

import numpy as np
from PIL import Image

from etpp_ssl.config import NotAtHand, UserError, may_change
from etpp_ssl.data.formats import finished, most_bytes, open_file, open_picture
from etpp_ssl.data.formats.base import Picture, Reading, one_line_reasons
from etpp_ssl.data.formats.pillow import opened_picture
from etpp_ssl.data.sources.base import DataConfig, expanded, images_of, printable

STREAMS = ("hfids", "tfds", "wds")
FOLDERS = ("", "torch/folder", "torch/image_folder")
"""Names that read `root` itself; of these, the empty one reads tars too."""


class TimmConfig(DataConfig):
    """A data set by timm's name: `hfds/...`, `torch/cifar10`, or empty for folders and tars."""

    name: Literal["timm"] = "timm"
    dataset: str = ""
    """timm's name of the data set."""
    root: str | None = may_change(None)
    """Where it lies; `~` and environment variables are expanded."""
    split: str = "train"
    """timm's name of the split to train on."""
    eval_split: str = "validation"
    """timm's name of the split for evaluation."""
    download: bool = may_change(False)
    """Let the library download it, where it can."""

    def open(self, split: str, *, in_chans: int, image_size: tuple[int, int], seed: int) -> TimmSource:
        """Open the "train" or the "eval" split; see `DataConfig.open`."""
        from timm.data import create_dataset

        name = self.split if split == "train" else self.eval_split
        root = None if self.root is None else str(expanded(self.root))
        self._check(root)
        # One process's open tar must not be read by another, and a cached table of contents beside the
        # tar (timm's way above 10 GB) can be stale or not writable.
        tar = {"cache_tarfiles": False, "cache_tarinfo": False} if _is_tar(self.dataset, root) else {}
        try:
            # input_img_mode '' leaves pictures as they are: ours is the conversion to channels.
            data = create_dataset(
                self.dataset,
                root,
                split=name,
                download=self.download,
                input_img_mode="",
                **tar,
            )
            size = len(data)
        except ImportError as error:
            raise NotAtHand(
                f"data.dataset {self.dataset!r} needs a library that is not installed ({error}): "
                f"pip install 'etpp-ssl[hub]'"
            ) from error
        except Exception as error:
            # timm and the libraries behind it raise anything, asserts included, for a wrong name.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise NotAtHand(
                f"data.dataset {self.dataset!r} (root {root!r}, split {name!r}) cannot be opened by "
                f"timm: {reason}"
            ) from error
        if size == 0:
            raise UserError(f"data.dataset {self.dataset!r} has no image in its split {name!r}")
        # Where timm finds no such sub-folder it takes all of `root`, training images included.
        opened = getattr(getattr(data, "reader", data), "root", None)
        if split == "eval" and self.dataset.lower() in FOLDERS and opened == root:
            raise UserError(
                f"data.eval_split {name!r} is not a sub-folder of data.root {root!r}; data.holdout=N keeps N "
                f"training images for evaluation"
            )
        return TimmSource(data, f"{self.dataset}/{name}", self.reading(in_chans))

    def _check(self, root: str | None) -> None:
        """Refuse what timm would misread or could not explain."""
        prefix = self.dataset.partition("/")[0].lower()
        if prefix in STREAMS:
            raise UserError(
                f"data.dataset {self.dataset!r} is a stream; only data sets that can be addressed by "
                f"index are supported: folders, tars (data.root=FILE.tar), torch/..., hfds/...; "
                f"data=webdataset and data=huggingface read streams"
            )
        if self.dataset and (prefix not in ("torch", "hfds") or "/" not in self.dataset):
            raise UserError(
                f"data.dataset {self.dataset!r} is not known; valid are torch/NAME (torch/cifar10), "
                f"hfds/NAME, and '' for data.root=FOLDER or data.root=FILE.tar"
            )
        if not self.dataset and root is None:
            raise UserError("data.root is missing: data.dataset '' reads a folder or a .tar file")
        if not self.dataset and root is not None and not os.path.exists(root):
            raise NotAtHand(f"data.root {root!r} does not exist")


class TimmSource:
    """A map-style data set of timm or torchvision.

    Args:
        data: what `create_dataset` returned.
        title: for the fingerprint and for names.
        reading: how they become pictures.
    """

    def __init__(self, data: Any, title: str, reading: Reading) -> None:
        self.data = data
        self.reader: Any = getattr(data, "reader", None)
        self.title = title
        self.reading = reading
        # The readers of folders and of tars disagree on what to call it.
        names = (
            getattr(data, "classes", None)
            or getattr(self.reader, "class_to_idx", None)
            or getattr(self.reader, "class_name_to_idx", None)
        )
        self.classes: list[str] | None = None
        if isinstance(names, dict):
            self.classes = sorted(names, key=lambda name: int(names[name]))
        elif names:
            self.classes = [str(name) for name in names]
        if self.classes is not None:
            # Without class folders timm makes one class of all images.
            self.classes = [printable(name) for name in self.classes] if len(self.classes) > 1 else None

    def __len__(self) -> int:
        return len(self.data)

    def open(self, index: int) -> Picture:
        """Read an image; see `ImageSource.open`."""
        with one_line_reasons():
            picture = self._item(index)[0]
            if isinstance(picture, str):
                return open_file(picture, self.reading)
            if not isinstance(picture, Image.Image):
                with picture:
                    data = picture.read(most_bytes(self.reading))
                return open_picture(data, self.reading)
            return finished(opened_picture(picture, self.reading.stored), self.reading)

    def label(self, index: int) -> int:
        """Class index, or -1."""
        if self.classes is None:
            return -1
        known = self._known_labels()
        return _label_in(self._item(index)[1] if known is None else known[index])

    def all_labels(self) -> np.ndarray | None:
        """See `ImageSource.all_labels`."""
        if self.classes is None:
            return np.full(len(self), -1)
        known = self._known_labels()
        if known is None and hasattr(self.reader, "iter_targets"):
            known = self.reader.iter_targets()
        return None if known is None else np.array([_label_in(entry) for entry in known], np.int64)

    def name(self, index: int) -> str:
        """The reader's file name, or the number of the image."""
        # A Hugging Face data set has a file name for some images only.
        file = self.reader.filename(index) if hasattr(self.reader, "filename") else None
        return printable(str(file)) if file else f"{self.title}[{index}]"

    def fingerprint(self) -> str:
        """Hash of the title and the number of images; not every library tells more."""
        text = f"{self.title}\n{len(self)}".encode()
        return hashlib.blake2b(text, digest_size=12).hexdigest()

    def describe(self) -> str:
        """Their number and classes, and which files timm looks for in a folder."""
        from timm.data import get_img_extensions

        classes = f"{len(self.classes):,} classes" if self.classes else "no labels"
        root, note = getattr(self.reader, "root", None), ""
        if isinstance(root, str) and os.path.isdir(root):
            note = f"; timm looks for {', '.join(sorted(get_img_extensions()))} only"
        return f"{images_of(len(self))} of {self.title!r} ({classes}){note}"

    def _known_labels(self) -> Any:
        """The library's own list of labels, or of files with labels, or None."""
        for owner, key in ((self.data, "targets"), (self.reader, "targets"), (self.reader, "samples")):
            known = getattr(owner, key, None)
            if known is not None:
                return known
        return None

    def _item(self, index: int) -> tuple[Any, Any]:
        # timm's own __getitem__ replaces a broken image by its neighbour without a word.
        if self.reader is None:
            # torchvision's folders tell their files, which are opened here: it looks at no limit.
            files = getattr(self.data, "samples", None)
            item = files[index] if files and isinstance(files[0][0], str) else self.data[index]
            return item[0], item[1]
        file, label, *_ = self.reader[index]
        return (io.BytesIO(file) if isinstance(file, bytes) else file), label


def _label_in(entry: Any) -> int:
    """A label, or the label of a (file, label), as the class index, -1 for None."""
    label = entry[1] if isinstance(entry, tuple) else entry
    return -1 if label is None else int(label)


def _is_tar(dataset: str, root: str | None) -> bool:
    """Whether timm reads `root` as a tar; its own test."""
    return not dataset and root is not None and os.path.isfile(root) and root.endswith(".tar")
