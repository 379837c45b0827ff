"""Cards of shipped tokenizers: what they were made of, what was measured, where they end."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from speechtok.encoders.lipcot import LipcotConfig, LipcotEncoder
from speechtok.errors import FormatError, InputError
from speechtok.tokenizer import Tokenizer
from speechtok.training.layers import pooled

__all__ = [
    "CREDITS",
    "GROUPS",
    "Corpus",
    "Figures",
    "Origin",
    "corpora",
    "data_table",
    "describe_data",
    "describe_encoder",
    "describe_run",
    "facts_table",
    "frame_delay",
    "markdown_table",
    "metadata",
    "number",
    "quality",
    "share_alike",
    "weights_size",
    "write_card",
    "write_credits",
    "write_makers",
]

# Credit of each corpus, by the first folder of its paths.
CREDITS = {
    "librispeech": "LibriSpeech (V. Panayotov, G. Chen, D. Povey, S. Khudanpur, 2015, openslr.org/12)",
    "librispeech_lossy": "LibriSpeech dev-clean after MP3 compression at 24 kbit/s (authors as above)",
    "speechocean762": "speechocean762 (J. Zhang et al., 2021, openslr.org/101; Mandarin speakers, half children)",
}
# What tables call groups of corpora.
GROUPS = {"native": "native", "lossy": "lossy (24 kbit/s MP3)", "accented": "accented", "pooled": "all"}


@dataclass(frozen=True)
class Corpus:
    """Sound that a model was made from.

    Parameters
    ----------
    name : str
        First folder of its paths.
    files, speakers : int
    hours : float
    licences, sources : tuple of str
    """

    name: str
    files: int
    speakers: int
    hours: float
    licences: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """Measured quality of one tokenizer, as ``speechtok evaluate`` writes it.

    Parameters
    ----------
    units : dict
        Of `speechtok.evaluation.units`.
    frames_abx, units_abx : dict
        Of `speechtok.evaluation.abx`.
    """

    units: dict[str, Any]
    frames_abx: dict[str, Any]
    units_abx: dict[str, Any]

    @classmethod
    def read(cls, units: Path, abx: Path) -> "Figures":
        """Read the JSON files of both commands; FormatError if they hold something else."""
        try:
            (first,), (frames, runs) = json.loads(units.read_text()), json.loads(abx.read_text())
            if (frames["representation"], runs["representation"]) != ("frames", "units"):
                raise ValueError("frames and units are needed, in this order")
            return cls(first, frames, runs)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{units} and {abx} are no tables of a tokenizer ({error!r}); make them anew") from error

    def of(self, folder: Path) -> Tokenizer:
        """The tokenizer of a bundle; FormatError if these are figures of another one."""
        tokenizer = Tokenizer.load(folder)
        for table in (self.units, self.frames_abx, self.units_abx):
            if table["fingerprint"] != tokenizer.fingerprint:
                raise FormatError(f"{folder}: the tables were made with {table['fingerprint']}; make them anew")
        return tokenizer


@dataclass(frozen=True)
class Origin:
    """Where a trained encoder comes from.

    Parameters
    ----------
    recipe : str
        Its name.
    config : dict
        What the recipe says (see `speechtok.training.recipe.Recipe`); empty if unknown.
    facts : dict
        ``steps``, ``hours``, ``parameters``, ``held_out`` as far as they are known.
    layer : int
        Of its frames.
    sweep : sequence of dict
        From which it was chosen, see `speechtok.training.layers.sweep`.
    curves : str
        Address of the picture, relative to the card; empty: none.
    """

    recipe: str
    config: dict[str, Any]
    facts: dict[str, Any]
    layer: int = 0
    sweep: Sequence[dict[str, Any]] = ()
    curves: str = ""


def corpora(folder: Path, split: str | None = None, name: str = "") -> list[Corpus]:
    """Sum up the ``metadata.jsonl`` of a data folder by corpus; InputError if it is missing or malformed.

    Parameters
    ----------
    folder : Path
    split : str, optional
        Count lines with this value of ``split`` only.
    name : str
        Of the whole folder, as one corpus; empty: the first folders of its paths are the corpora.
    """
    path = folder / "metadata.jsonl"
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in metadata(path):
        if split is None or line.get("split") == split:
            groups.setdefault(name or PurePosixPath(line["path"]).parts[0], []).append(line)
    try:
        return [
            Corpus(
                name, len(lines), len({line.get("speaker") for line in lines} - {None}),
                sum(line["duration_s"] for line in lines) / 3600,
                *(tuple(sorted({line[field] for line in lines})) for field in ("licence", "source_repo")),
            )
            for name, lines in groups.items()
        ]  # fmt: skip
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: a line lacks {error}; it needs path, duration_s, licence, source_repo") from error


def write_credits(folder: Path, noise: Path) -> Path:
    """Write ``CREDITS.md``: who made the noises of the train split of `noise`, by licence and source."""
    return write_makers(folder, "Noises that were mixed into training sound", {"": noise})


def write_makers(folder: Path, title: str, sounds: Mapping[str, Path]) -> Path:
    """Write ``CREDITS.md``: who made the train split of data folders, by heading, licence and source.

    Parameters
    ----------
    folder : Path
        A bundle.
    title : str
    sounds : mapping of str to Path
        Data folders by heading.
    """
    sections = [f"# {title}"]
    for heading, place in sounds.items():
        sections += [f"## {heading}"] if heading else []
        sections.append(_makers(place))
    path = folder / "CREDITS.md"
    path.write_text("\n\n".join(sections) + "\n")
    return path


def _makers(folder: Path) -> str:
    """Authors or artists of the train split of a data folder, with titles where there are any."""
    makers: dict[tuple[str, str], dict[str, set[str]]] = {}
    for line in metadata(folder / "metadata.jsonl"):
        if line.get("split") == "train":
            key = (str(line.get("licence", "unknown licence")), str(line.get("source_repo", "unknown source")))
            who = str(line.get("author") or line.get("artist") or "unnamed author")
            titles = makers.setdefault(key, {}).setdefault(who, set())
            titles |= {str(line["title"])} if line.get("title") else set()
    lines = []
    for (licence, source), found in makers.items():
        named = [f"{name} ({'; '.join(sorted(found[name]))})" if found[name] else name for name in sorted(found)]
        lines.append(f"- {licence}, by way of {source}: {', '.join(named)}")
    return "\n".join(sorted(lines))


def share_alike(folder: Path) -> float:
    """Hours of the train split of a data folder whose licence is CC BY-SA."""
    lines = [line for line in metadata(folder / "metadata.jsonl") if line.get("split") == "train"]
    return sum(line["duration_s"] for line in lines if str(line.get("licence")).startswith("CC BY-SA")) / 3600


def write_card(
    folder: Path,
    own: Figures,
    others: Sequence[Figures],
    data: Sequence[Corpus],
    command: str,
    origin: Origin | None,
    minutes: int | None = None,
) -> Path:
    """Write ``README.md`` of a tokenizer.

    Parameters
    ----------
    folder : Path
        A bundle.
    own, others : Figures
        Of this tokenizer and of those that it is compared with.
    data : sequence of Corpus
        Training sound.
    command : str
        That makes it.
    origin : Origin, optional
        For trained encoders.
    minutes : int, optional
        Of CPU time that reading, frames and clusters took.

    Raises
    ------
    FormatError
        If the figures are those of another tokenizer.
    """
    tokenizer = own.of(folder)
    parts = [
        f"# {tokenizer.name}",
        _intro(tokenizer, origin),
        facts_table(tokenizer, folder, own),
        "## Data",
        describe_data(data, (folder / "CREDITS.md").exists()),
        "## Recipe",
        _recipe(tokenizer, origin, command, minutes),
        "## Measured quality",
        quality(own, others),
        "## Limits",
        _limits(tokenizer, data),
    ]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def metadata(path: Path) -> list[dict[str, Any]]:
    """Lines of a ``metadata.jsonl``; InputError if it is missing or malformed."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not isinstance(line.get("path"), str) or not line["path"]:
            raise InputError(f"{path}:{number}: must be an object with a path")
    return lines


def _intro(tokenizer: Tokenizer, origin: Origin | None) -> str:
    if isinstance(tokenizer.encoder, LipcotEncoder):
        return _lipcot_intro(tokenizer, tokenizer.encoder.config)
    if origin is None:
        return (
            f"Kaldi MFCC with deltas ({tokenizer.encoder.dim} dimensions, {tokenizer.rate:g} per second) and "
            f"{tokenizer.vocab_size} k-means clusters: the teacher of HuBERT's first iteration (Hsu et al. 2021), and "
            "a baseline for learned tokenizers. It needs no network and runs anywhere."
        )
    return (
        f"A small w2v-BERT encoder (Chung et al. 2021, arXiv:2108.06209) that was pre-trained on unlabelled speech, "
        f"and {tokenizer.vocab_size} k-means clusters on the {_where(origin)} of "
        f"{len(origin.sweep)}; later blocks are not stored."
    )


def _lipcot_intro(tokenizer: Tokenizer, config: LipcotConfig) -> str:
    window, rate = 1000 * config.window / config.sample_rate, tokenizer.rate
    warped = f" on a frequency axis warped by {config.warp:g}" if config.warp else ""
    return (
        f"LiPCoT (Anjum 2024, arXiv:2408.07292). Every window of {window:g} ms is a linear prediction filter "
        f"of {config.order} poles by Burg's method{warped}; its features ({config.feature}, {config.dim} dimensions, "
        f"{rate:g} per second) are put into {tokenizer.vocab_size} k-means clusters. There is no network and no "
        "gradient: nothing is learned but the clusters. A unit is a filter, so `decode` turns units into sound again: "
        "noise through these filters, which whispers."
    )


def _where(origin: Origin) -> str:
    row = next(row for row in origin.sweep if row["layer"] == origin.layer)
    what = "frames that the contrastive loss compares, a projection of" if row["projected"] else "output of"
    return f"{what} block {origin.layer}"


def facts_table(tokenizer: Tokenizer, folder: Path, own: Figures) -> str:
    """Rate, vocabulary, bit rates, streams, size and licence of a bundle."""
    figures, delay = pooled(own.units)["bitrate"], frame_delay(tokenizer)
    stream = "approximate: frames depend on the whole utterance"
    if delay is not None:
        stream = f"exact, {delay * 1000:.0f} ms of delay at most"
    rows = [
        ("units per second", f"{tokenizer.rate:g} (about {figures['runs_per_second']:.1f} runs of equal units)"),
        ("vocabulary", f"{tokenizer.vocab_size}"),
        (
            "bit/s",
            f"{tokenizer.bitrate:.0f} nominal, {figures['entropy_bitrate_runs_and_durations']:.0f} by the entropy of "
            "runs and durations",
        ),
        ("streams", stream),
        *([("decoder", "to whispering, without weights")] if isinstance(tokenizer.encoder, LipcotEncoder) else []),
        ("size of the weights", weights_size(folder)),
        ("licence of the weights", tokenizer.licence),
        ("fingerprint", f"`{tokenizer.fingerprint}`"),
    ]
    return markdown_table(["", ""], rows)


def frame_delay(tokenizer: Tokenizer) -> float | None:
    """How long a frame may wait for what it depends on (s); None: for the end of the sound."""
    encoder = tokenizer.encoder
    if encoder.look_ahead is None:
        return None
    return (encoder.look_ahead + encoder.receptive_field) / encoder.sample_rate


def weights_size(folder: Path) -> str:
    """Size of the weights of a bundle, without those that it shares."""
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:.2f} MB"


def describe_data(data: Sequence[Corpus], noises: bool) -> str:
    """The section on training sound; `noises`: whether there is a ``CREDITS.md``."""
    text = f"{data_table(data)}\n\nCredits: {'; '.join(CREDITS.get(corpus.name, corpus.name) for corpus in data)}."
    if noises:
        text += " Noises were mixed in; who made them stands in [CREDITS.md](CREDITS.md)."
    return text + " The sound itself is not part of this folder."


def data_table(data: Sequence[Corpus]) -> str:
    """Hours and a table of training sound."""
    rows = [
        (c.name, f"{c.files:,}", f"{c.hours:.2f}", c.speakers or "", ", ".join(c.licences), ", ".join(c.sources))
        for c in data
    ]
    hours = sum(corpus.hours for corpus in data)
    text = f"{hours:.1f} h of training sound:\n\n"
    return text + markdown_table(["corpus", "files", "hours", "speakers", "licence", "by way of"], rows)


def _recipe(tokenizer: Tokenizer, origin: Origin | None, command: str, minutes: int | None) -> str:
    fit = tokenizer.training
    took = "" if minutes is None else f" Reading, frames and clusters took {minutes} min of CPU time."
    text = (
        f"Clusters: of {fit['frames seen']:,} frames a uniform sample of {fit['frames sampled']:,}, "
        f"{fit['iterations']} iterations, best of {fit['restarts']} starts, seed {fit['seed']}, "
        f"{'each dimension standardised' if fit['standardized'] else 'no standardisation'}; {fit['dead clusters']} "
        f"dead clusters, perplexity {fit['perplexity']:.1f} on the sample.{took}\n\nTo make it again: `{command}`."
    )
    if origin is None:
        return text
    text = f"{describe_encoder(origin)}\n\n{text}"
    if origin.curves:
        text += f"\n\n![loss and held-out figures over the steps]({origin.curves})"
    rows = [
        (
            f"{'**' if row['layer'] == origin.layer else ''}{row['layer']}{', projected' if row['projected'] else ''}"
            f"{'**' if row['layer'] == origin.layer else ''}",
            number(row["pnmi"], 3), number(row["pnmi_without_silence"], 3), number(row["abx_across"], 1),
        )
        for row in origin.sweep
    ]  # fmt: skip
    text += "\n\nThe layer was chosen by PNMI on the dev split:\n\n"
    return text + markdown_table(
        ["layer", "PNMI, silence kept", "PNMI, without silence", "ABX of frames, across (%)"], rows
    )


def describe_encoder(origin: Origin) -> str:
    """A line on the training of an encoder."""
    return f"Encoder: {describe_run(origin)}. Weights are rounded to bfloat16."


def describe_run(origin: Origin, where: str = "all blocks") -> str:
    """Recipe, seed, length and model of a training, as far as they are known; `where` all parameters are."""
    facts = origin.facts
    known = [f"recipe `{origin.recipe}`"]
    if "run" in origin.config:
        known.append(f"seed {origin.config['run']['seed']}")
    if "steps" in facts:
        known += [f"{facts['steps']:,} steps", f"{facts['hours']:,.1f} h of sound heard, repeats included"]
    if "parameters" in facts:
        known.append(f"{facts['parameters'] / 1e6:.2f} M parameters in {where}")
    if "model" in origin.config:
        model = origin.config["model"]
        known.append(", ".join(f"{name} {value}" for name, value in model.items()))
    return "; ".join(known)


def quality(own: Figures, others: Sequence[Figures]) -> str:
    """The section on measured figures of a tokenizer, next to those of others."""
    conventions = own.units["conventions"]
    phones, costs = [], []
    for figures in (own, *others):
        name = figures.units["tokenizer"]
        for group, found in figures.units["groups"].items():
            without, kept = found["without_silence"], found["with_silence"]
            frames, units = (table["groups"][group] for table in (figures.frames_abx, figures.units_abx))
            phones.append((
                name, GROUPS.get(group, group), f"{without['frames']:,}", number(without["pnmi_miller_madow"], 3),
                number(kept["pnmi_miller_madow"], 3), number(without["phone_purity"], 3),
                number(without["cluster_purity"], 3),
                *(number(table[who]["error"], 1) for table in (frames, units) for who in ("within", "across")),
            ))  # fmt: skip
        found = pooled(figures.units)
        edits = {family: value["ued"] for family, value in (found["ued"] or {}).items()}
        costs.append((
            name, found["codebook"]["units_used"], number(found["codebook"]["perplexity"], 1),
            number(found["bitrate"]["runs_per_second"], 1), number(found["bitrate"]["entropy_bitrate_runs"], 0),
            *(number(edit, 1) for edit in edits.values()),
        ))  # fmt: skip
    families = list((pooled(own.units)["ued"] or {}).keys())
    return "\n\n".join([
        "Evaluation split: speakers that no training or choice has seen. Phones come from a forced aligner (good "
        "enough to rank tokenizers, no gold standard); a frame has the phone at its centre, shifted by "
        f"{conventions['shift_frames']} frames. PNMI is corrected after Miller and Madow; frames, purities and the "
        "first PNMI are without silence. ABX errors in %, within and across speakers.",
        markdown_table(
            ["tokenizer", "speech", "frames", "PNMI", "PNMI, silence kept", "phone purity", "cluster purity",
             "ABX frames within", "across", "ABX units within", "across"], phones,
        ),
        "All speech; entropies of runs in bit/s"
        + ("; unit edit distance in % between clean and changed sound" if families else "") + ":",
        markdown_table(["tokenizer", "units used", "perplexity", "runs/s", "bit/s of runs", *families], costs),
    ])  # fmt: skip


def _limits(tokenizer: Tokenizer, data: Sequence[Corpus]) -> str:
    heard = (
        f"It has heard {sum(corpus.hours for corpus in data):.1f} h of read English (see Data); other languages, music "
        "and spontaneous speech were neither trained on nor measured here."
    )
    if isinstance(tokenizer.encoder, LipcotEncoder):
        return (
            "A baseline that needs no training, not a substitute for learned units: filters hear the channel and the "
            "speaker as MFCC do, and the filter of a noisy window is that of speech and noise together (see the edit "
            "distances). A filter has neither pitch nor phase, so what is decoded is whispered and without melody; its "
            "quality was not measured. " + heard
        )
    if not tokenizer.encoder.state_dict():
        return (
            "MFCC hear the channel and the speaker: sound without high frequencies (telephone, strong lossy "
            "compression) falls into few clusters, and noise or another voice changes most units (see the edit "
            "distances). " + heard
        )
    return (
        "This is a small model from little speech, meant for study, tests and small devices; published models that "
        "heard a thousand times more tell phones apart better. Units still follow the channel and the speaker to "
        "a degree that the edit distances and the row of lossy speech show. " + heard
    )


def number(value: float | None, digits: int) -> str:
    """Rounded, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Of a heading and rows of cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
