"""DICOM (.dcm), decoded by pydicom: values as the modality means them, by rescale slope and intercept.

MONOCHROME1 is inverted within the range that the stored bits have, and never by a picture's own values.
Windows (VOI), presentation states and overlays are not applied.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from etpp_ssl.data.formats.arrays import Scale, scaled
from etpp_ssl.data.formats.base import (
    Format,
    Picture,
    Reading,
    UnreadableImage,
    check_pixels,
    imported,
    one_line_reasons,
)
from etpp_ssl.data.formats.pictures import ArrayPicture, FramedPicture, LazyPicture
from etpp_ssl.data.formats.values import channel_numbers

_GRAY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
"""Photometric interpretations that pydicom brings to RGB."""
_PALETTE = "PALETTE COLOR"
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_DEFLATED = b"1.2.840.10008.1.2.1.99"
"""A transfer syntax, which the file's first elements name."""
_JPEG_2000 = b"\xff\x4f\xff\x51"
"""How its codestream begins: with the sizes."""
_JPEG_END = b"\xff\xd9"
_JPEG_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
"""Markers that start a frame, that of JPEG-LS among them."""


def _open(data: bytes, reading: Reading) -> Picture:
    with one_line_reasons("its data elements are damaged"):
        return _picture(*_read(data), reading)


def _picture(pydicom: ModuleType, dataset: Any, reading: Reading) -> Picture:
    _check_dataset(pydicom, dataset, reading.max_pixels)
    num_frames = int(dataset.get("NumberOfFrames") or 1)
    colours = dataset.PhotometricInterpretation not in _GRAY
    if num_frames > 1 and reading.frames:
        numbers = channel_numbers(3 if colours else 1, reading)

        def frame(number: int) -> Picture:
            size = (int(dataset.Columns), int(dataset.Rows))
            return LazyPicture(size, True, lambda: _of_frames(pydicom, dataset, [number], numbers))

        return FramedPicture(frame(0), num_frames, frame)
    if num_frames > 1 and (colours or reading.axes != "pages"):
        pages = ", data.axes=pages makes them channels, of which data.channels chooses"
        raise UnreadableImage(
            f"it has {num_frames} frames{' of colours' * colours}: data.frames=all makes each an image"
            f"{'' if colours else pages}"
        )
    numbers = channel_numbers(3 if colours else num_frames, reading)
    if colours:
        return _of_frames(pydicom, dataset, [0], numbers)
    return _of_frames(pydicom, dataset, list(range(num_frames)) if numbers is None else numbers)


def _of_frames(
    pydicom: ModuleType, dataset: Any, frames: list[int], numbers: list[int] | None = None
) -> Picture:
    """Frames side by side as channels, and of those the ones with these numbers."""
    decoded = _decoded(pydicom, dataset, sorted(set(frames)))
    planes = [_values(pydicom, dataset, decoded[number], number) for number in frames]
    values = np.concatenate([np.atleast_3d(plane) for plane, _ in planes], axis=2)
    if numbers is not None:
        values = values[:, :, numbers]
    gaps = [missing for _, missing in planes if missing is not None]
    return ArrayPicture(np.ascontiguousarray(values), ~np.logical_or.reduce(gaps) if gaps else None)


def _values(
    pydicom: ModuleType, dataset: Any, frame: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """A frame's values, (H, W) or (H, W, 3), and bool (H, W) where there is no data, if the file says so."""
    frame = frame.astype(frame.dtype.newbyteorder("="), copy=False)
    if dataset.PhotometricInterpretation == _PALETTE:
        return np.asarray(pydicom.pixels.apply_color_lut(frame, dataset)), None
    if dataset.PhotometricInterpretation in _COLOUR:
        return frame, None
    if frame.dtype.kind == "f":
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            raise UnreadableImage("it is MONOCHROME1 of floats, which have no range to be inverted in")
        kind = "FloatPixelPadding" if frame.dtype.itemsize == 4 else "DoubleFloatPixelPadding"
        missing = _padded(dataset, frame, kind, float)
        return _rescaled(dataset, frame, number), missing
    bits, signed = int(dataset.BitsStored), bool(dataset.get("PixelRepresentation"))
    stored = _stored(frame, bits, signed)

    def as_stored(value: Any) -> Any:
        # Some machines write -2000 as 63536, although the pixels are signed.
        return _stored(np.array([int(value)]).astype(frame.dtype), bits, signed)[0]

    missing = _padded(dataset, stored, "PixelPadding", as_stored)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        # The largest stored value, minus the value, plus the least.
        stored = np.invert(stored) if signed else stored.dtype.type(2**bits - 1) - stored
    return _rescaled(dataset, stored, number), missing


def _stored(values: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Integers without the bits beyond those that count, which may hold an overlay or anything."""
    unused = 8 * values.dtype.itemsize - bits
    if signed:
        return np.asarray((values << unused) >> unused)
    return np.asarray(values & values.dtype.type(2**bits - 1))


def _padded(dataset: Any, values: np.ndarray, key: str, as_stored: Any) -> np.ndarray | None:
    padding = dataset.get(f"{key}Value")
    if padding is None:
        return None
    limit = dataset.get(f"{key}RangeLimit")
    ends = sorted(as_stored(end) for end in (padding, padding if limit is None else limit))
    return np.asarray((values >= ends[0]) & (values <= ends[1]))


def _rescaled(dataset: Any, values: np.ndarray, number: int) -> np.ndarray:
    """By what the frame says, the frames together, or the file, in this order."""
    places = [
        groups[at].get("PixelValueTransformationSequence")
        for key, at in (("PerFrameFunctionalGroupsSequence", number), ("SharedFunctionalGroupsSequence", 0))
        if (groups := dataset.get(key)) and len(groups) > at
    ]
    place = next((sequence[0] for sequence in places if sequence), dataset)
    slope, intercept = place.get("RescaleSlope"), place.get("RescaleIntercept")
    scale: Scale = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))
    if not (math.isfinite(scale[0]) and math.isfinite(scale[1]) and scale[0] != 0):
        raise UnreadableImage(f"its rescale slope is {scale[0]:g} and its intercept {scale[1]:g}")
    return scaled(values, scale)


def _decoded(pydicom: ModuleType, dataset: Any, numbers: list[int]) -> dict[int, np.ndarray]:
    """Frames by number: (H, W), or (H, W, 3) of RGB."""
    syntax = dataset.file_meta.TransferSyntaxUID
    fault = f"its pixels ({syntax.name}) are damaged"
    if not syntax.is_encapsulated:
        claimed = pydicom.pixels.utils.get_expected_length(dataset)
        there = max(len(dataset.get(key) or b"") for key in _PIXELS)
        if there < claimed:
            raise UnreadableImage(f"its pixels take {claimed:,} bytes, but it has {there:,}")
    elif syntax != pydicom.uid.RLELossless:
        with one_line_reasons(fault):
            for frame in _encoded(pydicom, dataset, numbers):
                _check_frame(frame, dataset)
    # pylibjpeg's own decoder of RLE ends the process on some damaged frames: a panic is no Exception.
    plugin = "pydicom" if syntax == pydicom.uid.RLELossless else ""
    with one_line_reasons(fault):
        frames = pydicom.pixels.iter_pixels(dataset, indices=numbers, decoding_plugin=plugin)
        return dict(zip(numbers, frames, strict=True))


def _encoded(pydicom: ModuleType, dataset: Any, numbers: list[int]) -> Iterator[bytes]:
    offsets = [dataset.get(key) for key in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    for number in numbers:
        yield pydicom.encaps.get_frame(
            dataset.PixelData,
            number,
            number_of_frames=int(dataset.get("NumberOfFrames") or 1),
            extended_offsets=tuple(offsets) if all(offsets) else None,
        )


def _check_frame(frame: bytes, dataset: Any) -> None:
    """Check a frame of JPEG, JPEG-LS or JPEG 2000, whose decoders trust its own header.

    Raises:
        UnreadableImage: if it is of another size, or has no end.
    """
    start = frame.find(_JPEG_2000)
    if start >= 0:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        size = (right - left, bottom - top)
    else:
        # libjpeg makes something up where a frame breaks off. It is filled up to an even length.
        if _JPEG_END not in frame[-16:]:
            raise UnreadableImage("its pixels are incomplete: a frame of JPEG has no end")
        size = _size_of_jpeg(frame)
    if size != (dataset.Columns, dataset.Rows):
        raise UnreadableImage(
            f"its pixels are damaged: a frame of {size[0]:,} x {size[1]:,} pixels, and it says "
            f"{dataset.Columns:,} x {dataset.Rows:,}"
        )


def _size_of_jpeg(frame: bytes) -> tuple[int, int]:
    """(width, height) of its frame header, the first of the segments that start a frame."""
    place = 2
    while frame[place] == 0xFF and frame[place + 1] not in _JPEG_FRAMES:
        place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    height, width = struct.unpack_from(">HH", frame, place + 5)
    return width, height


def _read(data: bytes) -> tuple[ModuleType, Any]:
    pydicom = imported("pydicom", "DICOM", "dicom")
    imported("pydicom.pixels", "DICOM", "dicom")
    if _DEFLATED in data[132:512]:
        # A kilobyte of it can become a gigabyte, and nothing says so before.
        raise UnreadableImage("its transfer syntax is Deflated Explicit VR, which is not read: convert it")
    return pydicom, pydicom.dcmread(io.BytesIO(data))


def _check_dataset(pydicom: ModuleType, dataset: Any, max_pixels: int) -> None:
    """Check everything that can be known before a pixel is decoded.

    Raises:
        UnreadableImage: for what cannot be read, or not with what is installed.
    """
    if not any(key in dataset for key in _PIXELS):
        encrypted = ": they are encrypted" if "EncryptedAttributesSequence" in dataset else ""
        raise UnreadableImage(f"it has no pixels{encrypted or ', or is incomplete'}")
    missing = [
        key
        for key in ("Rows", "Columns", "BitsAllocated", "PhotometricInterpretation")
        if dataset.get(key) is None
    ]
    if missing:
        raise UnreadableImage(f"it does not say its {', '.join(missing)}")
    check_pixels((int(dataset.Columns), int(dataset.Rows)), max_pixels)
    photometric = dataset.PhotometricInterpretation
    if photometric not in (*_GRAY, *_COLOUR, _PALETTE):
        known = ", ".join((*_GRAY, *_COLOUR, _PALETTE))
        raise UnreadableImage(f"its photometric interpretation is {photometric!r}: {known} are read")
    samples = 3 if photometric in _COLOUR else 1
    if dataset.get("SamplesPerPixel", 1) != samples:
        raise UnreadableImage(f"it has {dataset.SamplesPerPixel} samples a pixel, but is {photometric}")
    if "ModalityLUTSequence" in dataset:
        raise UnreadableImage("its values pass through a table (Modality LUT), which is not applied")
    bits, high = dataset.get("BitsStored"), dataset.get("HighBit")
    if bits is not None and not (0 < bits <= dataset.BitsAllocated and high in (None, bits - 1)):
        raise UnreadableImage(
            f"it stores {bits} of {dataset.BitsAllocated} bits up to bit {high}: the highest has to be "
            f"bit {bits - 1}"
        )
    _require_decoder(pydicom, dataset)


def _require_decoder(pydicom: ModuleType, dataset: Any) -> None:
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise UnreadableImage("it does not say its transfer syntax")
    try:
        decoder = pydicom.pixels.get_decoder(syntax)
    except NotImplementedError as error:
        raise UnreadableImage(f"its transfer syntax is {syntax.name!r}, which is not read") from error
    if not decoder.is_available:
        raise UnreadableImage(
            f"its transfer syntax is {syntax.name!r}, whose decoder is not installed: "
            f"pip install 'etpp-ssl[dicom]'"
        )


def _check(data: bytes, max_pixels: int) -> None:
    with one_line_reasons("its data elements are damaged"):
        _check_dataset(*_read(data), max_pixels)


FORMAT = Format(frozenset({".dcm"}), (b"DICM",), _open, _check, signature_at=128)
