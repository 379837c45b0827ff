"""How well codecs give sound back, at several bitrates, beside Opus."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from speechtok.audio.decode import load
from speechtok.audio.lossy import through_opus
from speechtok.corpus.engine import Event
from speechtok.corpus.sources import Utterance, scan
from speechtok.errors import InputError, SpeechtokError
from speechtok.evaluation.spectrograms import draw_spectrograms
from speechtok.evaluation.units import spread
from speechtok.metrics import bitrate, phonetic, signal
from speechtok.tokenizer import Tokenizer
from speechtok.units import Units

__all__ = ["evaluate"]

Wave = NDArray[np.float32]

Measures = dict[str, Callable[[Wave, Wave, int], float]]

FIGURES: Measures = {
    "mel_distance": signal.mel_distance,
    "multi_scale_mel_distance": signal.multi_scale_mel_distance,
    "si_sdr": lambda reference, estimate, rate: signal.si_sdr(reference, estimate),
}
SPEECH: Measures = {"stoi": signal.stoi, "pesq": signal.pesq}


@dataclass
class _Row:
    """What is measured of one way to send sound, over all files."""

    name: str
    codebooks: int | None
    asked: float | None
    seconds: float = 0.0
    bits: float = 0.0
    encoding: float = 0.0
    decoding: float = 0.0
    ids: list[NDArray[np.int32]] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)


def evaluate(
    source: str | Path,
    tokenizer: Tokenizer,
    codebooks: Sequence[int] = (2, 4, 8),
    *,
    speech: bool = True,
    opus: Sequence[float] = (6000.0, 12000.0),
    limit_files: int | None = None,
    picture: Path | None = None,
    picture_of: str | None = None,
    picture_seconds: float = 4.0,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Encode and decode held-out sound and compare it with the original.

    Parameters
    ----------
    source : path or glob
        As for ``tokenize``.
    tokenizer : Tokenizer
        With a decoder.
    codebooks : sequence of int
        Each a row: the first so many codebooks.
    speech : bool
        Whether the sound is speech: only then STOI and PESQ are measured.
    opus : sequence of float
        Bitrates (bit/s), each a row.
    limit_files : int, optional
        At most this many files, evenly spread.
    picture : Path, optional
        Where spectrograms of one file, original and decoded, are drawn.
    picture_of : str, optional
        Key of that file; the first one that can be read where None.
    picture_seconds : float
        How much of it.
    on_event : callable
        Told the progress in files.

    Returns
    -------
    dict
        ``rows``: one for each number of codebooks and each Opus: ``system``, ``codebooks``, ``bitrate`` (bit/s;
        nominal of tokenizers, packets of Opus), ``asked_bitrate`` (Opus), ``entropy_bitrate`` (tokenizers),
        ``figures`` (each ``mean`` and ``standard_error`` over ``files``), ``encode_speed`` and ``decode_speed``
        (seconds of sound per second; tokenizers). ``codebooks``: use of each, with ``entropy`` (bits) and
        ``entropy_share`` of log2 K. ``unmeasured``: files without a figure, counted over all rows, by figure and
        reason. ``failed``: files that cannot be read, and why. ``conventions``: all that the figures depend on besides
        tokenizer and data.

    Raises
    ------
    InputError
        If no file can be used, there are not so many codebooks, or a package for STOI or PESQ is missing.
    FormatError
        If the tokenizer has no decoder.
    """
    if not codebooks:
        raise InputError("give at least one number of codebooks")
    if speech:
        signal.require_packages()
    listing = scan(str(source))
    files = spread(listing.utterances, limit_files)
    if picture_of is not None and picture_of not in {file.key for file in files}:
        raise InputError(f"{picture_of!r} is none of the {len(files)} files of {source}; their keys have no extension")
    codecs = [tokenizer.with_codebooks(count) for count in sorted(set(codebooks))]
    rate, measured = tokenizer.sample_rate, FIGURES | (SPEECH if speech else {})
    rows = [
        _Row(f"{tokenizer.name}, {codec.codebooks} of {tokenizer.codebooks}", codec.codebooks, None) for codec in codecs
    ]
    rows += [_Row(f"Opus {bits / 1000:g} kbit/s", None, bits) for bits in opus]
    failed, unmeasured = {bad.path: bad.reason for bad in listing.rejected}, dict[str, dict[str, int]]()
    used, drawn = 0, False
    for used, (file, wave) in enumerate(_readable(files, rate, failed), 1):
        if used == 1:  # what is compiled or allocated once is no part of the speed
            codecs[-1].decode(codecs[-1].encode(wave, rate))
        versions = {"original": wave}
        for row, codec in zip(rows, [*codecs, *(None for _ in opus)], strict=True):
            decoded = _opus(row, wave, rate) if codec is None else _codec(row, codec, wave)
            versions[row.name] = decoded
            _measure(row, wave, decoded, rate, measured, unmeasured)
        if picture is not None and (used == 1 if picture_of is None else file.key == picture_of):
            pieces = {name: version[: round(picture_seconds * rate)] for name, version in versions.items()}
            draw_spectrograms(pieces, rate, picture, title=file.key)
            drawn = True
        on_event(Event("run", used, len(files)))
    if not used:
        raise InputError(
            f"{source}: no usable sound" + "".join(f"; the first file: {r}" for r in [*failed.values()][:1])
        )
    if picture is not None and not drawn:
        raise InputError(f"{picture_of!r} of {source} cannot be drawn: it could not be read; name another file")
    return {
        "tokenizer": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "data": Path(source).resolve().name,
        "speech": speech,
        "files": used,
        "seconds": rows[0].seconds,
        "conventions": CONVENTIONS
        | {
            "sample_rate": rate,
            "threads": torch.get_num_threads(),
            "limit": "all files" if limit_files is None else f"at most {limit_files}, evenly spread",
        },
        "rows": [_summary(row, tokenizer) for row in rows],
        "codebooks": _use(rows[len(codecs) - 1].ids, tokenizer.vocab_size),
        "unmeasured": unmeasured,
        "failed": failed,
    }


CONVENTIONS = {
    "original": "mono, at the tokenizer's rate",
    "mel_distance": "mean |ln| of 80 mel magnitudes, window 1024, hop 256, floor 1e-5",
    "multi_scale_mel_distance": "DAC: sum over windows 32 to 2048 with 5 to 320 bins of mean |log10|, floor 1e-5",
    "si_sdr": "dB, means removed",
    "stoi": "pystoi, not extended",
    "pesq": "wideband, at 16 kHz",
    "bitrate": "tokenizers: nominal; Opus: its packets without the container, variable bitrate",
    "entropy_bitrate": "sum over codebooks of the entropy of their unigrams times the rate",
    "speed": "seconds of sound per second of work, file by file",
}


def _readable(files: Sequence[Utterance], rate: int, failed: dict[str, str]) -> Iterator[tuple[Utterance, Wave]]:
    """Files with their waves; the others are noted in `failed`."""
    for file in files:
        try:
            wave = load(file.open(), rate)
        except SpeechtokError as error:
            failed[file.path] = str(error)
        else:
            yield file, wave


def _measure(
    row: _Row, wave: Wave, decoded: Wave, rate: int, measures: Measures, unmeasured: dict[str, dict[str, int]]
) -> None:
    """Note all figures of a sound, and why there is none."""
    for name, measure in measures.items():
        try:
            value = measure(wave, decoded, rate)
            if not np.isfinite(value):
                raise InputError(f"it is {value}: the sound came back exactly, or as silence")
            row.figures.setdefault(name, []).append(value)
        except InputError as error:
            reasons = unmeasured.setdefault(name, {})
            reasons[str(error)] = reasons.get(str(error), 0) + 1


def _codec(row: _Row, codec: Tokenizer, wave: Wave) -> Wave:
    """Send a wave through a tokenizer: what comes out, of the same length."""
    begin = time.perf_counter()
    units: Units = codec.encode(wave, codec.sample_rate)
    middle = time.perf_counter()
    decoded = codec.decode(units)
    row.encoding += middle - begin
    row.decoding += time.perf_counter() - middle
    row.seconds += len(wave) / codec.sample_rate
    row.ids.append(np.atleast_2d(units.ids))
    return _fitted(decoded, wave, codec.encoder.grid.receptive_field)


def _opus(row: _Row, wave: Wave, rate: int) -> Wave:
    decoded, bits = through_opus(wave, rate, row.asked or 0.0)
    row.bits += bits
    row.seconds += len(wave) / rate
    return _fitted(decoded, wave, 1)


def _fitted(decoded: Wave, wave: Wave, field: int) -> Wave:
    """Fill up with zeros what a codec without a last partial frame leaves out, less than what a frame reads."""
    missing = len(wave) - len(decoded)
    if not 0 <= missing < field:
        raise InputError(f"{len(wave)} samples came back as {len(decoded)}; the codec does not keep time")
    return np.pad(decoded, (0, missing))


def _summary(row: _Row, tokenizer: Tokenizer) -> dict[str, Any]:
    result: dict[str, Any] = {"system": row.name, "codebooks": row.codebooks, "asked_bitrate": row.asked}
    if row.codebooks is None:
        result |= {"bitrate": row.bits / row.seconds, "entropy_bitrate": None}
        result |= {"encode_speed": None, "decode_speed": None}
    else:
        rate = tokenizer.encoder.grid.rate
        found = bitrate.evaluate(row.ids, row.seconds, rate=rate, vocab_size=tokenizer.vocab_size)
        result |= {"bitrate": found["nominal_bitrate"], "entropy_bitrate": found["entropy_bitrate"]}
        result |= {"encode_speed": row.seconds / row.encoding, "decode_speed": row.seconds / row.decoding}
    return result | {"figures": {name: _mean(values) for name, values in row.figures.items()}}


def _mean(values: Sequence[float]) -> dict[str, float | int | None]:
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error, "files": len(values)}


def _use(ids: Sequence[NDArray[np.int32]], vocab_size: int) -> list[dict[str, float]]:
    """How each codebook is used over all files."""
    result = []
    for row in np.concatenate(ids, axis=1):
        found = phonetic.codebook_use(row, vocab_size)
        bits = float(np.log2(found["perplexity"]))
        result.append({**found, "entropy": bits, "entropy_share": bits / float(np.log2(vocab_size))})
    return result
