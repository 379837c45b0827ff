"""Import torchaudio whether or not its extension can be loaded.

The wheels on the package index link CUDA libraries. Beside a CPU build of torch the extension cannot be loaded, but
the Python half (Kaldi features, effects, transforms) works without it. Import torchaudio only through this module.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__all__ = ["import_torchaudio"]


def import_torchaudio() -> ModuleType:
    """Return torchaudio; where its extension cannot be loaded, without the functions that need it.

    Raises
    ------
    ImportError
        If torchaudio is not installed.
    """
    try:
        return importlib.import_module("torchaudio")
    except OSError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        extension: Any = ModuleType("torchaudio._extension")
        extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
        extension._check_cuda_version = lambda: None
        extension.fail_if_no_align = lambda function: function
        sys.modules["torchaudio._extension"] = extension
        return importlib.import_module("torchaudio")
