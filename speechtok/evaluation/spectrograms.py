"""Spectrograms of one sound in several versions, one below the other."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.features import log_mel
from speechtok.errors import InputError, OutputError

__all__ = ["draw_spectrograms"]

_BINS, _WINDOW = 96, 1024


def draw_spectrograms(waves: Mapping[str, NDArray[np.float32]], sample_rate: int, out: Path, *, title: str) -> None:
    """Draw log mel spectra of all versions on the colours of the first one.

    Parameters
    ----------
    waves : mapping of str to float32 [N]
        Versions by name.
    sample_rate : int
        Hz.
    out : Path
        PNG, PDF or SVG to write.
    title : str

    Raises
    ------
    InputError
        If `out` is no picture or there is nothing to draw.
    OutputError
        If it cannot be written.
    """
    from matplotlib.figure import Figure

    if out.suffix.lower() not in {".png", ".pdf", ".svg"}:
        raise InputError(f"{out}: pictures are written as .png, .pdf or .svg")
    if not waves or any(len(wave) == 0 for wave in waves.values()):
        raise InputError("there is no sound to draw")
    images = {name: _image(wave, sample_rate) for name, wave in waves.items()}
    first = next(iter(images.values()))
    low, high = float(np.quantile(first, 0.05)), float(first.max())
    figure = Figure(figsize=(8.0, 1.5 * len(images) + 0.6), dpi=80, layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, (name, image) in zip(figure.subplots(len(images), 1, squeeze=False)[:, 0], images.items(), strict=True):
        end = len(waves[name]) / sample_rate
        axes.imshow(image, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high, extent=(0, end, 0, _BINS))
        axes.set_ylabel(name, fontsize=8)
        axes.set_yticks([])
        axes.tick_params(labelsize=7, labelbottom=axes.get_subplotspec().is_last_row())
    axes.set_xlabel("seconds", fontsize=8)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except OSError as error:
        raise OutputError(f"{out}: the picture cannot be written ({error.strerror})") from error


def _image(wave: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
    samples = torch.from_numpy(np.ascontiguousarray(wave, np.float32))[None]
    lengths = torch.tensor([len(wave)])
    features = log_mel(samples, lengths, sample_rate=sample_rate, n_fft=_WINDOW, hop=_WINDOW // 4, bins=_BINS)[0]
    image: NDArray[np.float32] = features[0].T.numpy()
    return image
