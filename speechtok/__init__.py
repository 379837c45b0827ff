"""speechtok: speech and audio tokenization.

``speechtok.load(name)`` gives a `Tokenizer`; its ``encode``, ``encode_batch`` and ``stream`` give `Units`.
Importing this package loads neither torch nor numpy: names are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speechtok.errors import SpeechtokError
    from speechtok.hub import load
    from speechtok.streaming import Stream, Streams
    from speechtok.tokenizer import Tokenizer
    from speechtok.units import Units

__version__ = "0.1.0"
__all__ = ["SpeechtokError", "Stream", "Streams", "Tokenizer", "Units", "__version__", "load"]

_NAMES = {
    "SpeechtokError": "errors",
    "Stream": "streaming",
    "Streams": "streaming",
    "Tokenizer": "tokenizer",
    "Units": "units",
    "load": "hub",
}
_MODULES = {"codecs", "corpus", "encoders", "evaluation", "kernels", "quantizers", "segmenters", "training"}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"speechtok.{_NAMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"speechtok.{name}")
    raise AttributeError(f"module 'speechtok' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
