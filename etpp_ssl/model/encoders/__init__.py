"""Encoders that pre-training can mask: timm's networks, told apart by what they can do."""

from etpp_ssl.model.encoders.base import MaskableEncoder, Positions
from etpp_ssl.model.encoders.build import (
    EXPLICIT_ARCHITECTURE,
    EXPLICIT_NAME,
    VIT_DIMS,
    EncoderConfig,
    build_encoder,
    encode_visible,
    encoder_args,
    encoder_of,
    init_linear,
    is_maskable,
    maskable,
    transformer_of,
    unused_weights,
)

__all__ = [
    "EXPLICIT_ARCHITECTURE",
    "EXPLICIT_NAME",
    "VIT_DIMS",
    "EncoderConfig",
    "MaskableEncoder",
    "Positions",
    "build_encoder",
    "encode_visible",
    "encoder_args",
    "encoder_of",
    "init_linear",
    "is_maskable",
    "maskable",
    "transformer_of",
    "unused_weights",
]
