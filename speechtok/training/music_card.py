"""Card of a tokenizer of music: what it was made of, what probes tell from its frames, where it ends."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechtok.errors import FormatError
from speechtok.evaluation.probe import with_interval
from speechtok.tokenizer import Tokenizer
from speechtok.training.cards import Corpus, Origin, describe_encoder, frame_delay, markdown_table, weights_size
from speechtok.training.codec_card import describe_heard

__all__ = ["write_card"]


def write_card(
    folder: Path,
    probes: Path,
    data: Sequence[Corpus],
    share_alike: float,
    teacher: str,
    command: str,
    origin: Origin,
    choosing: Mapping[str, Mapping[str, int]],
) -> Path:
    """Write ``README.md`` of a tokenizer of music.

    Parameters
    ----------
    folder : Path
        A bundle with ``CREDITS.md``.
    probes : Path
        JSON file with what `speechtok.evaluation.probe.compare` says of several features, this tokenizer's with its
        ``fingerprint``.
    data : sequence of Corpus
        Training sound.
    share_alike : float
        Hours of it under CC BY-SA.
    teacher : str
        Codec that taught the encoder.
    command : str
        That makes it.
    origin : Origin
        Of the encoder; its ``sweep`` has for each layer the accuracy of each task of `choosing`, and their ``mean``.
    choosing : mapping
        Tasks that chose the layer, with their ``items`` and ``groups``.

    Raises
    ------
    FormatError
        If the file holds something else, or the figures are those of another tokenizer.
    """
    tokenizer = Tokenizer.load(folder)
    try:
        tables = json.loads(probes.read_text())
        own = [table for table in tables if table["tokenizer"] == tokenizer.name]
        made = {table["fingerprint"] for table in own}
        if not own or not all(table["chosen"]["difference"] and table["conventions"] for table in tables):
            raise ValueError(f"{tokenizer.name} is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{probes}: no tables of {folder} ({error!r}); make them anew") from error
    if made != {tokenizer.fingerprint}:
        raise FormatError(f"{folder}: the tables were made with another tokenizer; make them anew")
    parts = [
        f"# {tokenizer.name}",
        _intro(tokenizer, teacher, origin),
        _facts(tokenizer, folder),
        "## Data",
        f"{describe_heard(data, share_alike)} The teacher, [{teacher}](../{teacher}/README.md), has heard speech and "
        "noises besides.",
        "## Recipe",
        _recipe(tokenizer, origin, command, choosing),
        "## Measured quality",
        _measured(tables, own),
        "## Limits",
        _limits(tokenizer, data),
    ]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _intro(tokenizer: Tokenizer, teacher: str, origin: Origin) -> str:
    return (
        "A small MERT encoder (Li et al. 2023, arXiv:2306.00107) that was pre-trained on unlabelled music: of hidden "
        f"frames it tells the codes of [{teacher}](../{teacher}/README.md), the acoustic teacher, and constant-Q "
        f"magnitudes, the musical one. Units are {tokenizer.vocab_size} k-means clusters on the output of block "
        f"{origin.layer} of {len(origin.sweep) - 1}; later blocks are not stored."
    )


def _facts(tokenizer: Tokenizer, folder: Path) -> str:
    delay = frame_delay(tokenizer)
    stream = "approximate: frames depend on the whole sound"
    if delay is not None:
        stream = f"exact, {delay * 1000:.0f} ms of delay at most"
    rows = [
        ("units per second", f"{tokenizer.rate:g}"),
        ("vocabulary", f"{tokenizer.vocab_size}"),
        ("bit/s", f"{tokenizer.bitrate:.0f} nominal"),
        ("sound", f"mono at {tokenizer.sample_rate / 1000:g} kHz"),
        ("streams", stream),
        ("size of the weights", weights_size(folder)),
        ("licence of the weights", tokenizer.licence),
        ("fingerprint", f"`{tokenizer.fingerprint}`"),
    ]
    return markdown_table(["", ""], rows)


def _recipe(tokenizer: Tokenizer, origin: Origin, command: str, choosing: Mapping[str, Mapping[str, int]]) -> str:
    fit = tokenizer.training
    parts = [describe_encoder(origin)]
    if "objective" in origin.config:
        told = ", ".join(f"{name} {value}" for name, value in origin.config["objective"].items())
        parts[0] += f" Objective: {told}."
    for held_out in origin.facts.get("held_out", ()):
        titles = {"loss": "loss", "accuracy": "accuracy of codes", "cqt_r2": "explained variance of magnitudes"}
        found = [f"{title} {held_out[name]:.3f}" for name, title in titles.items() if name in held_out]
        if found:
            parts.append(f"Held-out music (split valid) at step {held_out['step']:,}: {', '.join(found)}.")
    parts += [
        f"Clusters: of {fit['frames seen']:,} frames a uniform sample of {fit['frames sampled']:,}, "
        f"{fit['iterations']} iterations, best of {fit['restarts']} starts, seed {fit['seed']}; {fit['dead clusters']} "
        f"dead clusters, perplexity {fit['perplexity']:.1f} on the sample.",
        f"To make it again: `{command}`.",
    ]
    if origin.curves:
        parts.append(f"![loss and held-out figures over the steps]({origin.curves})")
    sounds = " and ".join(
        f"{_title(name)} ({x['items']} notes, {x['groups']} instruments)" for name, x in choosing.items()
    )
    rows = []
    for row in origin.sweep:
        mark = "**" if row["layer"] == origin.layer else ""
        cells = [f"{100 * row[name]:.1f}" for name in (*choosing, "mean")]
        rows.append([f"{mark}{row['layer']}{mark}", *cells])
    parts += [
        f"The layer was chosen by linear probes on notes of the splits train and valid only, by the mean accuracy of "
        f"{sounds}; folds keep instruments whole. Layer 0 is the input of the first block and was not to choose:",
        markdown_table(["layer", *(f"{_title(name)} (%)" for name in choosing), "mean"], rows),
    ]
    return "\n\n".join(parts)


def _title(task: str) -> str:
    return task.replace("_", " ")


def _measured(tables: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]]) -> str:
    how, first = tables[0]["conventions"], tables[0]["tokenizer"]
    parts = [
        f"Probes on all sounds of `{tables[0]['data']}` that a task has a label for: {how['probe']} on frozen "
        f"features, {how['pooling']}; {how['folds']} folds, grouped by {how['grouped_by']}: none is in training and "
        "test. Regularisation and layer are chosen inside of the training folds. Figures in %, with intervals "
        f"({how['interval']}). The encoder has heard the notes of the train split, without their labels; layer and "
        "units were chosen on those of train and valid."
    ]
    both = (("accuracy", "interval"), ("balanced_accuracy", "balanced_interval"))
    for task in dict.fromkeys(table["task"] for table in tables):
        some = [table for table in tables if table["task"] == task]
        about, rows = some[0], list[list[str]]()
        for table in some:
            chosen = table["chosen"]
            rows.append([table["tokenizer"], *(with_interval(chosen, *one) for one in both)])
            rows[-1].append("-" if table is about else with_interval(chosen["difference"], "accuracy", "interval"))
        rows.append(["always the most frequent", *(with_interval(about["majority"], *one) for one in both), "-"])
        left_out = ", ".join(f"{name} ({found['items']})" for name, found in about["left_out"].items())
        without = f"; left out, since only one instrument has them: {left_out}" if left_out else ""
        parts += [
            f"### {_title(task).capitalize()}",
            f"{about['items']} sounds, {about['groups']} instruments, {len(about['classes'])} classes "
            f"({', '.join(about['classes'])}), chance {100 * about['chance']:.1f}{without}.",
            markdown_table(["features", "accuracy", "balanced accuracy", f"accuracy over {first}"], rows),
        ]
    layers = list(own[0]["layers"])
    cells = [
        [_title(table["task"]), *(with_interval(table["layers"][layer], "accuracy", "interval") for layer in layers)]
        for table in own
    ]
    parts += [
        f"Every layer of {own[0]['tokenizer']} that is stored, accuracy. The best of a row is chosen on the test folds "
        "and is no fair figure:",
        markdown_table(["", *(f"layer {layer}" for layer in layers)], cells),
    ]
    return "\n\n".join(parts)


def _limits(tokenizer: Tokenizer, data: Sequence[Corpus]) -> str:
    hours = sum(corpus.hours for corpus in data)
    heard = (
        "What the frames tell of pitch class is in the constant-Q input, and hardly more of it is learned: an encoder "
        "before its first step tells as much (docs/measurements.md). "
        if tokenizer.encoder.config.feature_extractor_cqt
        else ""
    )
    return (
        f"This is a small model from {hours:.1f} h of music and single notes, meant for study, tests and small "
        "devices; published models have heard up to 160,000 h. The music is mostly that of games, lo-fi and chiptune, "
        "with some wind bands and few vocals, and nearly all of it had been through a lossy codec before. Pitched "
        f"notes are of few instruments, so intervals are wide. {heard}Frames were measured, units were not, and only "
        "on single sounds: neither melody, chords nor speech. There is no way back from these units to sound; a codec "
        "has one."
    )
