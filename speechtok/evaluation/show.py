"""A picture of one file: waveform, spectrogram, units."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechtok.audio.decode import AudioFile, resampled
from speechtok.audio.features import log_mel
from speechtok.errors import InputError, OutputError
from speechtok.tokenizer import Tokenizer

__all__ = ["draw"]


def draw(
    path: str | os.PathLike[str], tokenizer: Tokenizer, out: Path, *, start: float = 0.0, seconds: float = 5.0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Encode a file and draw a stretch of it.

    Parameters
    ----------
    path : path
    tokenizer : Tokenizer
    out : Path
        PNG to write.
    start, seconds : float
        The stretch.

    Returns
    -------
    facts : dict
        On the file and its units.
    runs : list of dict
        Runs of equal units in the stretch, or segments where these are the units: start, end (s), unit, frames.
    """
    if out.suffix.lower() not in {".png", ".pdf", ".svg"}:
        raise InputError(f"{out}: pictures are written as .png, .pdf or .svg")
    with AudioFile(path) as file:
        wave = np.concatenate(list(resampled(file.blocks(), file.sample_rate, tokenizer.sample_rate)))
        facts: dict[str, Any] = {
            "sample rate": file.sample_rate,
            "channels": file.channels,
            "seconds": round(file.num_samples / file.sample_rate, 3),
        }
    units = tokenizer.encode(wave, tokenizer.sample_rate)
    first = units if units.ids.ndim == 1 else type(units)(
        units.ids[0], units.starts, units.ends, units.sample_rate, units.vocab_size, units.fingerprint
    )  # fmt: skip
    length = max(1e-9, len(wave) / tokenizer.sample_rate)
    if tokenizer.codebooks > 1:
        facts["codebooks"] = f"{tokenizer.codebooks}, of which the first is drawn"
    facts |= {"tokenizer": tokenizer.name, "units": len(units), "units/s": round(len(units) / length, 2)}
    if tokenizer.segmenter is None:
        spans, (_, durations) = first.deduplicated(), first.run_lengths()
        facts |= {"runs of equal units": len(spans), "runs/s": round(len(spans) / length, 2)}
    else:
        spans, durations = first, (first.ends - first.starts) // tokenizer.encoder.hop
        silences = int((first.ids == tokenizer.silence_unit).sum())
        facts |= {"silence units": silences, "segments/s": round((len(first) - silences) / length, 2)}
    facts |= {"distinct units": len(np.unique(units.ids)), "vocabulary": units.vocab_size}
    end = min(start + seconds, length)
    if start >= length:
        raise InputError(f"{path} lasts {length:.2f} s; --start {start:g} lies behind its end")
    table = [
        {"start": round(float(begin), 4), "end": round(float(stop), 4), "unit": int(unit), "frames": int(frames)}
        for begin, stop, unit, frames in zip(
            spans.starts_seconds, spans.ends_seconds, spans.ids, durations, strict=True
        )
        if stop > start and begin < end
    ]
    rate = "runs/s" if tokenizer.segmenter is None else "segments/s"
    _picture(wave, tokenizer, table, out, (start, end), f"{Path(path).name}   {tokenizer.name}   {facts[rate]} {rate}")
    return facts, table


def _picture(
    wave: np.ndarray,
    tokenizer: Tokenizer,
    table: list[dict[str, Any]],
    out: Path,
    span: tuple[float, float],
    title: str,
) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rate, (start, end) = tokenizer.sample_rate, span
    piece = wave[int(start * rate) : int(end * rate)]
    figure = Figure(figsize=(max(8.0, min(40.0, 2.4 * (end - start))), 6.0), dpi=110, layout="constrained")
    sound, mel, lane = figure.subplots(3, 1, sharex=True, height_ratios=[1, 2.4, 0.8])
    sound.plot(start + np.arange(len(piece)) / rate, piece, linewidth=0.4, color="#305070")
    sound.set(ylabel="amplitude", title=title)
    padded = np.pad(piece, (0, max(0, 1024 - len(piece))))
    features, _ = log_mel(torch.from_numpy(padded)[None], torch.tensor([len(padded)]), sample_rate=rate)
    image = features[0].T.numpy()
    mel.imshow(
        image, origin="lower", aspect="auto", cmap="magma", extent=(start, start + len(padded) / rate, 0, len(image)),
        vmin=float(np.quantile(image, 0.05)),
    )  # fmt: skip
    mel.set(ylabel="mel band")
    # Neighbouring ids are unrelated: spread them over the colours instead of shading by value.
    palette = colormaps["hsv"]
    if tokenizer.segmenter is not None:
        # Where one segment follows another the two borders are one line.
        for border in {time for run in table for time in (run["start"], run["end"])}:
            mel.axvline(border, color="white", linewidth=0.8, alpha=0.8)
    for run in table:
        begin, width = run["start"], run["end"] - run["start"]
        silent = run["unit"] == tokenizer.silence_unit
        lane.barh(
            0,
            width,
            left=begin,
            height=1,
            color="0.75" if silent else palette(run["unit"] * 0.618034 % 1.0),
            alpha=0.55,
            edgecolor="white",
            linewidth=0.5,
        )
        # The upright number needs about this share of the picture's width; narrower runs stay without one.
        if width / (end - start) > 0.009:
            name = "silence" if silent else str(run["unit"])
            lane.text(begin + width / 2, 0, name, ha="center", va="center", fontsize=7, rotation=90, clip_on=True)
    lane.set(xlim=(start, end), ylim=(-0.5, 0.5), yticks=[], xlabel="seconds", ylabel="units")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror})") from error
