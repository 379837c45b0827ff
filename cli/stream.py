"""``speechtok stream``."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .common import DEFAULT_TOKENIZER, Device, TokenizerName

if TYPE_CHECKING:
    from speechtok.units import Units


def stream(
    tokenizer: TokenizerName = DEFAULT_TOKENIZER,
    rate: Annotated[
        int | None, typer.Option(help="Sample rate of raw PCM (Hz); without it a wav header is expected.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of raw PCM: u8, s16le, s24le, s32le, f32le or f64le.")] = "s16le",
    channels: Annotated[int, typer.Option(min=1, help="Of raw PCM, interleaved.")] = 1,
    window_seconds: Annotated[
        float | None,
        typer.Option(help="For bidirectional encoders: answer in windows of this length (default: the tokenizer's)."),
    ] = None,
    context_seconds: Annotated[float, typer.Option(help="Context on both sides of such windows.")] = 1.0,
    device: Device = "cpu",
) -> None:
    """Read sound from standard input (wav or raw PCM), write units as JSON lines as they come.

    Where units are segments, each has its own start and end.

    Example: arecord -t raw -f S16_LE -r 16000 | speechtok stream --rate 16000
    """
    import speechtok
    from speechtok.audio.wav import ENCODINGS, pcm_blocks, read_header
    from speechtok.errors import AudioError, InputError
    from speechtok.frames import WindowRule

    if sys.stdin is None:
        raise InputError("standard input is closed; pipe sound into this command")
    source, limit = sys.stdin.buffer, None
    if rate is None:
        header = read_header(source, "standard input")
        if header.encoding is None:
            raise AudioError(
                "standard input: the wav stream is compressed; decode it first (for example with sox or ffmpeg)"
            )
        rate, encoding, channels, limit = header.sample_rate, header.encoding, header.channels, header.data_bytes
    if encoding not in ENCODINGS:
        raise InputError(f"unknown encoding {encoding!r}; known are: {', '.join(ENCODINGS)}")
    loaded = speechtok.load(tokenizer, device=device)
    window = None if window_seconds is None else WindowRule(window_seconds, context_seconds)
    with loaded.stream(rate, window=window) as session:
        for block in pcm_blocks(source, encoding, channels, rate // 20, limit):
            _write(session.push(block), segments=loaded.segmenter is not None)
        _write(session.flush(), segments=loaded.segmenter is not None)


def _write(units: "Units", *, segments: bool) -> None:
    if len(units):
        record: dict[str, object] = {
            "start": round(float(units.starts_seconds[0]), 6),
            "end": round(float(units.ends_seconds[-1]), 6),
            "units": units.ids.tolist(),
        }
        if segments:  # of frames, start and end say where each is
            record["starts"] = units.starts_seconds.round(6).tolist()
            record["ends"] = units.ends_seconds.round(6).tolist()
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()
