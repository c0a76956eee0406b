"""Masked autoencoder pre-training with the EfficientTrain++ frequency-cropping curriculum.

    import etpp_ssl
    encoder = etpp_ssl.load("runs/photos")      # a run, an export, a weights file, or a timm name
    features = encoder.embed(["a.jpg", "b.tif"])

`import etpp_ssl` alone imports nothing else: each of these names brings its module along when it is first
used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from etpp_ssl import moved

if TYPE_CHECKING:
    from etpp_ssl.config import UserError
    from etpp_ssl.encoder import Encoder
    from etpp_ssl.encoder_sources import load
    from etpp_ssl.recipe import FinetuneRecipe, Recipe
    from etpp_ssl.report.reconstruction import Reconstructed
    from etpp_ssl.train.launch import finetune, pretrain

__version__ = "0.6.0"
__all__ = [
    "Encoder",
    "FinetuneRecipe",
    "Recipe",
    "Reconstructed",
    "UserError",
    "__version__",
    "finetune",
    "load",
    "pretrain",
]

_MODULES = {
    "Encoder": "encoder",
    "FinetuneRecipe": "recipe",
    "Recipe": "recipe",
    "Reconstructed": "report.reconstruction",
    "UserError": "config",
    "finetune": "train.launch",
    "load": "encoder_sources",
    "pretrain": "train.launch",
}
"""Where each public name is defined."""

moved.install()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
