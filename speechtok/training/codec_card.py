"""Card of a codec: what it was made of, what comes back at which bitrate, where it ends."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speechtok.errors import FormatError
from speechtok.tokenizer import Tokenizer
from speechtok.training.cards import (
    CREDITS,
    Corpus,
    Origin,
    data_table,
    describe_run,
    frame_delay,
    markdown_table,
    number,
    weights_size,
)
from speechtok.training.codec_config import CodecObjectiveConfig
from speechtok.training.recipe import section

__all__ = ["describe_heard", "write_card"]

# What is measured: its title, and digits of the mean.
_FIGURES = {
    "mel_distance": ("mel distance", 3),
    "multi_scale_mel_distance": ("DAC's mel distance", 3),
    "si_sdr": ("SI-SDR (dB)", 2),
    "stoi": ("STOI", 3),
    "pesq": ("PESQ", 2),
}
_FEWER = "mel_books"  # begins the names of the losses of fewer codebooks
_LOSSY = "librispeech_lossy"


def write_card(
    folder: Path,
    table: Path,
    data: Sequence[Corpus],
    share_alike: float,
    command: str,
    origin: Origin,
    pictures: Sequence[str],
) -> Path:
    """Write ``README.md`` of a codec.

    Parameters
    ----------
    folder : Path
        A bundle with a decoder and ``CREDITS.md``.
    table : Path
        JSON file with what `speechtok.evaluation.codec.evaluate` says of several kinds of sound, each with the
        ``decoder_fingerprint`` of the codec.
    data : sequence of Corpus
        Training sound.
    share_alike : float
        Hours of it under CC BY-SA.
    command : str
        That makes it.
    origin : Origin
        Of the codec.
    pictures : sequence of str
        Files with spectrograms in `folder`.

    Raises
    ------
    FormatError
        If the file holds something else, or the figures are those of another codec.
    """
    tokenizer = Tokenizer.load(folder)
    try:
        tables = json.loads(table.read_text())
        made = {(one["fingerprint"], one["decoder_fingerprint"]) for one in tables}
        if not tables or not all(one["rows"] and one["codebooks"] and one["conventions"] for one in tables):
            raise ValueError("it is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{table}: no tables of a codec ({error!r}); make them anew") from error
    if made != {(tokenizer.fingerprint, tokenizer.decoder_fingerprint)}:
        raise FormatError(f"{folder}: the tables were made with another codec; make them anew")
    parts = [
        f"# {tokenizer.name}",
        _intro(tokenizer),
        _facts(tokenizer, folder),
        "## Use",
        _use(tokenizer),
        "## Data",
        describe_heard(data, share_alike),
        "## Recipe",
        _recipe(origin, command),
        "## Measured quality",
        _measured(tables, tokenizer),
        *(f"![spectrograms of the original, of what comes back, and of Opus]({picture})" for picture in pictures),
        "## Limits",
        _limits(tokenizer, data, origin),
    ]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def describe_heard(data: Sequence[Corpus], share_alike: float) -> str:
    """The section on training sound of models that have heard more than speech.

    Parameters
    ----------
    data : sequence of Corpus
    share_alike : float
        Hours under CC BY-SA.
    """
    spoken = [CREDITS[corpus.name] for corpus in data if corpus.name in CREDITS]
    named = f"Credits of the speech: {'; '.join(spoken)}. " if spoken else ""
    return (
        f"{data_table(data)}\n\n{named}Who made the {'other ' if spoken else ''}sound stands in "
        f"[CREDITS.md](CREDITS.md), by licence; {share_alike:.2f} h of it "
        "are under CC BY-SA (share alike). The sound itself is not part of this folder."
    )


def _intro(tokenizer: Tokenizer) -> str:
    return (
        f"A neural codec for speech, music and other sound, mono at {tokenizer.sample_rate / 1000:g} kHz: an encoder, "
        f"a residual quantizer of {tokenizer.codebooks} codebooks and a decoder (SEANet as in EnCodec, Défossez et al. "
        "2022, arXiv:2210.13438, but smaller). Every frame has an id of each codebook. "
        "The first codebooks alone are a coarser codec of fewer bits; the decoder takes any number of them."
    )


def _facts(tokenizer: Tokenizer, folder: Path) -> str:
    rate, delay = tokenizer.encoder.grid.rate, frame_delay(tokenizer)
    bits = float(np.log2(tokenizer.vocab_size))
    stream = "approximate: frames depend on the whole sound"
    if delay is not None:
        stream = f"exact, {delay * 1000:.0f} ms of delay at most; decoding adds none"
    rows = [
        ("frames per second", f"{rate:g}, each with {tokenizer.codebooks} ids"),
        ("vocabulary", f"{tokenizer.vocab_size:,} in each codebook"),
        ("bit/s", f"{tokenizer.bitrate:.0f} nominal with all codebooks, {rate * bits:.0f} of each"),
        ("streams", stream),
        ("size of the weights", weights_size(folder)),
        ("licence of the weights", tokenizer.licence),
        ("fingerprint", f"`{tokenizer.fingerprint}`, of the decoder `{tokenizer.decoder_fingerprint}`"),
    ]
    return markdown_table(["", ""], rows)


def _use(tokenizer: Tokenizer) -> str:
    name, few = tokenizer.name, max(1, tokenizer.codebooks // 4)
    return (
        f"```\nspeechtok tokenize SOUNDS --tokenizer {name} -o OUT\n"
        f"speechtok tokenize SOUNDS --tokenizer {name} --codebooks {few} -o FEW  # fewer bits\n"
        f"speechtok synth OUT -o WAVS  # back to sound\n```\n\n"
        f'```python\ncodec = speechtok.load("{name}")\nunits = codec.encode("sound.flac")  # ids [codebooks, frames]\n'
        f"wave = codec.decode(units)  # float32, as long as the sound\n"
        f'few = codec.with_codebooks({few}).encode("sound.flac")\n```'
    )


def _recipe(origin: Origin, command: str) -> str:
    config = origin.config
    parts = [f"Codec: {describe_run(origin, 'encoder, codebooks and decoder')}. Weights are rounded to bfloat16."]
    if "objective" in config:
        told = ", ".join(f"{name} {value}" for name, value in config["objective"].items())
        parts[0] += f" Objective: {told}."
        objective = _objective(config)
        if objective.adversarial_from < 1:
            text = f"In the last {100 * (1 - objective.adversarial_from):.0f} % of the steps a discriminator takes part"
            if objective.decoder_from <= objective.adversarial_from:
                text += "; by then encoder and codebooks are finished, and only the decoder learns"
            parts.append(text + ".")
    for held_out in origin.facts.get("held_out", ()):
        fewer = [(int(name.removeprefix(_FEWER)), x) for name, x in held_out.items() if name.startswith(_FEWER)]
        figures = [f"mel loss {held_out['mel']:.3f}"] if "mel" in held_out else []
        figures += [f"{value:.3f} with {count} of the codebooks" for count, value in sorted(fewer, reverse=True)]
        figures += [f"SI-SDR {held_out['si_sdr']:.2f} dB"] if "si_sdr" in held_out else []
        shares = [100 * x for name, x in held_out.items() if name.startswith("book") and name.endswith("_entropy")]
        if shares:
            figures.append(f"entropy of the codebooks {min(shares):.1f} to {max(shares):.1f} % of the bits of a code")
        if figures:
            parts.append(f"Held-out sound (dev) at step {held_out['step']:,}: {', '.join(figures)}.")
    parts.append(f"To make it again: `{command}`.")
    if origin.curves:
        parts.append(f"![loss and held-out figures over the steps]({origin.curves})")
    return "\n\n".join(parts)


def _objective(config: dict[str, Any]) -> CodecObjectiveConfig:
    return section(CodecObjectiveConfig, config["objective"], "objective")


def _measured(tables: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> str:
    conventions = tables[0]["conventions"]
    parts = [
        "For tokenizers of speech units, cards stand beside MFCC with k-means; what a codec is held against is another "
        "codec, here Opus (libopus, as libsndfile carries it). Held-out sound that no training or choice has seen: "
        + "; ".join(
            f"{one['data']} ({one['conventions']['limit']}: {one['files']} files, {one['seconds']:,.0f} s)"
            for one in tables
        )
        + ". Means over files, ± standard error. Lower is better for mel distances, higher for the rest. Mel distance: "
        f"{conventions['mel_distance']}. DAC's: {conventions['multi_scale_mel_distance'].removeprefix('DAC: ')}. "
        f"SI-SDR: {conventions['si_sdr']}. STOI: {conventions['stoi']}; PESQ: {conventions['pesq']}; both for speech "
        "only. Rates of the codec are nominal, and by the entropy of its ids; those of Opus are of its packets "
        f"({conventions['bitrate'].split('; ')[-1].removeprefix('Opus: its packets ')}). Speed: seconds of sound per "
        f"second of work on {_threads(conventions['threads'])}, file by file."
    ]
    for one in tables:
        named = {name: title for name, (title, _) in _FIGURES.items() if any(name in r["figures"] for r in one["rows"])}
        rows = [_row(row, named) for row in one["rows"]]
        parts += [
            f"### {one['data']}",
            markdown_table(
                ["", "kbit/s", "by entropy", *named.values(), "encoding, times real time", "decoding"], rows
            ),
        ]
        for name, reasons in one["unmeasured"].items():
            parts.append(
                f"Without {_FIGURES[name][0]}, over all rows: "
                + "; ".join(f"{times} times, {reason}" for reason, times in reasons.items()) + "."
            )  # fmt: skip
    head, bits = ["codebook"], float(np.log2(tokenizer.vocab_size))
    for one in tables:
        head += [f"perplexity, {one['data']}", f"entropy, share of {bits:g} bits"]
    uses = []
    for book in range(len(tables[0]["codebooks"])):
        cells: list[Any] = [book + 1]
        for one in tables:
            use = one["codebooks"][book]
            cells += [f"{use['perplexity']:.0f}", f"{100 * use['entropy_share']:.1f} %"]
        uses.append(cells)
    size = f"{tokenizer.vocab_size:,}"
    parts.append(f"Use of the codebooks, of {size} codes each (entropies of little sound come out low):")
    parts.append(markdown_table(head, uses))
    return "\n\n".join(parts)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _row(row: dict[str, Any], named: dict[str, str]) -> list[str]:
    cells = [row["system"], f"{row['bitrate'] / 1000:.2f}"]
    cells.append(number(None if row["entropy_bitrate"] is None else row["entropy_bitrate"] / 1000, 2))
    for name in named:
        found, digits = row["figures"].get(name), _FIGURES[name][1]
        if found is None:
            cells.append("-")
        else:
            error = found["standard_error"]
            cells.append(f"{found['mean']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}"))
    return cells + [number(row[name], 1) for name in ("encode_speed", "decode_speed")]


def _limits(tokenizer: Tokenizer, data: Sequence[Corpus], origin: Origin) -> str:
    hours = sum(corpus.hours for corpus in data)
    spoken = sum(corpus.hours for corpus in data if corpus.name in CREDITS)
    lossy = sum(corpus.hours for corpus in data if corpus.name == _LOSSY)
    texts = [
        f"A small model from {hours:.1f} h of sound, meant for study, tests and as a teacher: the tables show Opus "
        "beside it, and published codecs have heard thousands of hours.",
        f"Bandwidth: sound is brought to {tokenizer.sample_rate / 1000:g} kHz, so nothing above "
        f"{tokenizer.sample_rate / 2000:g} kHz comes back. The speech that it has heard ends at 8 kHz"
        + (f", {lossy:.1f} h of it nothing above about 7 kHz" if lossy else "")
        + ", and nearly all of the music had been through a lossy codec before.",
    ]
    if "objective" in origin.config:
        gain = _objective(origin.config).gain_db
        texts.append(
            f"Level: training sound was made louder or softer by up to {gain:g} dB, no more; bring much fainter sound "
            "to a usual level first."
        )
    texts.append(
        f"Not trained on: other speech than read English ({spoken:.1f} h), singing but for a few vocals in the music, "
        "voices that overlap, telephone sound, stereo (channels are averaged)."
    )
    return " ".join(texts)
