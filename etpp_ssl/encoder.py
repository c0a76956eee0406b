"""An encoder for notebooks: images in; features, maps of features and reconstructions out.

Legend: N images, C channels, H, W pixels, h, w entries of a map, p, q pixels per entry, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from etpp_ssl.config import MAX_SIDE, UserError, show_size
from etpp_ssl.curriculum.frequency import low_frequency_crop, pixels_with_data
from etpp_ssl.data.channels import mean_over_channels, stacked
from etpp_ssl.data.formats.base import Reading
from etpp_ssl.data.given import AnyImage, each, viewed
from etpp_ssl.data.views import EvalView, Normalise, by_lanczos, has_gaps
from etpp_ssl.evaluation.feature_maps import check_whole, map_of, map_stride, tokens_of
from etpp_ssl.evaluation.features import (
    Pool,
    Precision,
    check_pool,
    evaluating,
    forward_pass,
    images_per_pass,
    num_features,
    pooled,
)
from etpp_ssl.messages import shown
from etpp_ssl.report.reconstruction import Decoding, Reconstructed, check_bandwidth


class Encoder:
    """Turns images into features; `etpp_ssl.load` makes it.

    Images are files, PIL images, arrays or tensors, in any mix:

    - Files and PIL images are read as in training: EXIF orientation is applied, and gray, palette, RGBA and
      CMYK are converted for an encoder of 1 or 3 channels. Any other number of channels must be the file's
      own. An encoder that was trained with `data.range` takes values of any depth by it (`reading.range`);
      for others 16-bit values keep their high byte.
    - Arrays are (H, W) or (H, W, C) with the encoder's channels (RGB order). Without a range they are uint8
      from 0 to 255 or uint16 from 0 to 65535, and float arrays are refused: nothing tells their range.
    - All of these are resized to cover `image_size / crop_pct` (bicubic), cropped at the centre as in
      evaluation, and normalised by `mean` and `std`.
    - Float tensors (C, H, W), or a batch (N, C, H, W), are taken as they are: normalised already, as
      `transform` returns them.

    Args:
        model: the plain timm network. A classifier keeps its head; `embed` gives what the head reads. Moving
            it to another device moves the encoder.
        image_size: (H, W) in pixels that the network was built for.
        mean, std: per channel, of values in [0, 1] of the range.
        crop_pct: share of the resized image's side that the centre crop keeps.
        reading: how files and arrays become pictures, as in training; None is for photographs of 8 bits.
        classes: class names in the order of a classifier's outputs, otherwise None.
        precision: of `embed` and `patches`, whose results are float32 in any case.
        origin: what was loaded, in words.
        notes: what was assumed, converted or dropped on loading, a line each.
        decoding: the decoder, where there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        crop_pct: float = 0.875,
        reading: Reading | None = None,
        classes: list[str] | None = None,
        precision: Precision = "fp32",
        origin: str = "an encoder",
        notes: tuple[str, ...] = (),
        decoding: Decoding | None = None,
    ) -> None:
        self.model: Any = model.eval()
        self.image_size = image_size
        self.mean, self.std = mean, std
        self.crop_pct = crop_pct
        self.reading = reading or Reading(len(mean))
        self.classes = classes
        self.precision: Precision = precision
        self.origin = origin
        self.notes = notes
        self._decoding = decoding

    def __repr__(self) -> str:
        kind = f"{type(self.model).__name__}, {self.num_features} features"
        size = f"{self.in_chans} x {self.image_size[0]} x {self.image_size[1]} px"
        return f"Encoder({kind} of {size}, {self.precision} on {self.device}: {self.origin})"

    @property
    def in_chans(self) -> int:
        """C."""
        return len(self.mean)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        parameter: Tensor = next(self.model.parameters())
        return parameter.device

    @property
    def num_features(self) -> int:
        """D."""
        return num_features(self.model)

    @property
    def patch_size(self) -> tuple[int, int]:
        """(p, q) pixels per entry of `patches`: a ViT's patch, otherwise the network's total stride."""
        return map_stride(self.model)

    def to(self, device: str | torch.device) -> Encoder:
        """Move it to a device, in place.

        Returns:
            The encoder itself.
        """
        self.model.to(device)
        return self

    def transform(self, image: AnyImage, size: int | tuple[int, int] | None = None) -> Tensor:
        """What the model is shown of an image.

        Args:
            image: see the class; a float tensor comes back as it is.
            size: (H, W) in pixels, or one number for both; None is `image_size`.

        Returns:
            Normalised float32 (C, H, W), on the CPU.

        Raises:
            UserError: for an image that cannot be read, has other channels or is of another kind.
        """
        return self._seen(image, 0, self._size(size)).cpu().contiguous()

    def embed(
        self, images: AnyImage | Iterable[AnyImage], *, pool: Pool | None = None, batch_size: int = 256
    ) -> Tensor:
        """One vector per image, as `etpp embed` writes them.

        Of a run, the same readable images in the same order have the bits of `etpp embed`, on the same device
        with the same batch size and number of threads. An image's features do not depend on the other images,
        but a library may take another kernel for another number of images, which changes last bits: no CPU
        has been seen to, GPUs were not measured.

        Images are read in this process, one after the other; `etpp embed` is faster for a large data set.

        Args:
            images: one or several; see the class. An array (N, H, W, C) and a tensor (N, C, H, W) are N
                images. Tensors may be of any size that is whole patches, all of one call the same.
            pool: a ViT's "token" (cls) or "avg" (mean of the patches); None is the model's own.
            batch_size: images in memory at once. On a CPU at most 64 of them pass the model together.

        Returns:
            float32 (N, D), on the CPU.

        Raises:
            UserError: if there are no images, or one cannot be read (its name is told), has other channels or
                another size; or for a pooling that the model does not have.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        check_pool(self.model, pool)
        rows: list[Tensor] = []

        def features_of(images: Tensor) -> Tensor:
            return pooled(self.model, tokens_of(self.model, images, self.image_size), pool).float()

        numbered = enumerate(each(images))
        with forward_pass(self.model, self.device, self.precision):
            while chunk := list(itertools.islice(numbered, batch_size)):
                most = images_per_pass(batch_size, self.device)
                if self.reading.sampled and not any(isinstance(image, Tensor) for _, image in chunk):
                    views = stacked([self._view(image, number, self.image_size) for number, image in chunk])
                    for part in views.to(self.device).split(most):
                        rows.append(
                            mean_over_channels(
                                part, self.in_chans, lambda raw: features_of(self._normalise(raw))
                            ).cpu()
                        )
                    continue
                batch = _stacked([self._seen(image, number, self.image_size) for number, image in chunk])
                rows += [features_of(part).cpu() for part in batch.split(most)]
        if not rows:
            raise UserError("there is no image to embed")
        # Outside of the inference mode, whose tensors no head can be trained on.
        return torch.cat(rows)

    def patches(self, image: AnyImage, size: int | tuple[int, int] | None = None) -> Tensor:
        """A map of features: those of each patch, behind the model's final norm.

        At another size than `image_size`, a ViT's positions cover the same scene: sin-cos ones are computed
        at the new patch centres, learned ones resampled.

        Args:
            image: one image; see the class. A float tensor has its own size, which may be any of whole
                patches.
            size: (H, W) in pixels, or one number, that other images are brought to; None is `image_size`.

        Returns:
            float32 (h, w, D) with h = H / p and w = W / q, on the CPU.

        Raises:
            UserError: for an image as in `embed`, a size that is not whole patches (naming the nearest ones
                that are), or a network that has no such map or does not run at this size.
        """
        wanted = self._size(size)
        if not isinstance(image, Tensor):
            self._check_whole(wanted)
        with forward_pass(self.model, self.device, self.precision):
            batch = _stacked([self._seen(_one(image), 0, wanted)])
            found = (batch.shape[-2], batch.shape[-1])
            self._check_whole(found)
            rows = map_of(self.model, tokens_of(self.model, batch, self.image_size), found).float().cpu()
        return rows[0].clone()

    def reconstruct(
        self, image: AnyImage, bandwidth: int | tuple[int, int] | None = None, *, seed: int = 0
    ) -> Reconstructed:
        """Hide patches of an image and let the model predict them, in float32.

        Args:
            image: one image; see the class. A float tensor must have `image_size`.
            bandwidth: (H, W) in pixels, or one number, of the low-frequency crop that the model is shown:
                whole patches, at most `image_size`, which None stands for.
            seed: of the mask, which is the one that `etpp reconstruct --seed` draws for its first image, and
                of the channels where the run samples them.

        Returns:
            Pictures as float arrays in [0, 1], for `plt.imshow(shown.reconstruction)` for instance.

        Raises:
            UserError: if the weights have no decoder or it does not predict pixels, or for an image or a
                bandwidth that is not legal.
        """
        decoding = self._decoding
        if decoding is None:
            raise UserError(
                f"{self.origin} has no decoder to reconstruct with; a run of etpp pretrain has one"
            )
        at = self._size(bandwidth, "bandwidth")
        check_bandwidth(at, self.image_size, self.patch_size)
        image = _one(image)
        has_data = None
        if isinstance(image, Tensor):
            seen = self._seen(image, 0, self.image_size)
            if tuple(seen.shape[-2:]) != self.image_size:
                wanted = (self.in_chans, *self.image_size)
                raise UserError(f"the tensor is {tuple(seen.shape)}; to be reconstructed it must be {wanted}")
        else:
            view = self._view(image, 0, self.image_size, seed)
            if decoding.lanczos and at != self.image_size:
                view = by_lanczos(view, at)
            seen = self._normalised(view)
            if has_gaps(view):
                has_data = pixels_with_data(view[None].to(self.device), at)
        crop = low_frequency_crop(seen, at)
        with evaluating(decoding.model):
            return decoding.reconstruct(crop, seed, self.mean, self.std, has_data)

    def _size(self, size: Any, name: str = "size") -> tuple[int, int]:
        """(H, W) of what a caller gives for it; `image_size` of None."""
        if size is None:
            return self.image_size
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if len(sides) != 2 or not all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in sides):
            raise UserError(f"{name} is {shown(size)}; give (height, width), 1 to {MAX_SIDE} pixels each")
        return sides

    def _check_whole(self, size: tuple[int, int]) -> None:
        if size != self.image_size:
            check_whole(size, self.patch_size)

    def _seen(self, image: AnyImage, number: int, size: tuple[int, int]) -> Tensor:
        """Normalised float32 (C, H, W) on the model's device."""
        if not isinstance(image, Tensor):
            pixels = self._view(image, number, size)
            if len(pixels) != self.in_chans:
                raise UserError(
                    f"image {number} has {len(pixels)} channels, and the encoder takes {self.in_chans} at "
                    f"once: embed gives the mean over all"
                )
            return self._normalised(pixels)
        shape, dtype = tuple(image.shape), str(image.dtype).removeprefix("torch.")
        if not image.is_floating_point():
            raise UserError(
                f"image {number} is a tensor of {dtype}: tensors hold normalised values, float (C, H, W); "
                f"give pixels as an array (H, W, C)"
            )
        if len(shape) != 3 or shape[0] != self.in_chans or 0 in shape:
            raise UserError(f"image {number} is a tensor {shape}; the encoder takes ({self.in_chans}, H, W)")
        return image.detach().to(self.device, torch.float32)

    def _view(self, image: AnyImage, number: int, size: tuple[int, int], seed: int | None = None) -> Tensor:
        """The evaluation view of what has to be read, (C, H, W): all channels, or those that a seed draws."""
        drawn = self.in_chans if self.reading.sampled and seed is not None else None
        view = EvalView(size, self.crop_pct, drawn, seed or 0)
        return viewed(image, number, view, self.reading)

    def _normalised(self, pixels: Tensor) -> Tensor:
        return self._normalise(pixels[None].to(self.device))[0]

    def _normalise(self, pixels: Tensor) -> Tensor:
        return Normalise(self.mean, self.std, self.device, self.reading)(pixels)


def _one(image: AnyImage) -> AnyImage:
    """The image of a tensor (1, C, H, W); any other is one already, or refused by whoever reads it."""
    return image[0] if isinstance(image, Tensor) and image.ndim == 4 and len(image) == 1 else image


def _stacked(images: list[Tensor]) -> Tensor:
    """One batch (N, C, H, W)."""
    sizes = list(dict.fromkeys((image.shape[-2], image.shape[-1]) for image in images))
    if len(sizes) > 1:
        raise UserError(
            f"images of {' and '.join(map(show_size, sizes[:2]))} px do not fit in one batch; embed tensors "
            f"of another size than the encoder's by themselves"
        )
    return torch.stack(images)
