"""The card of a tokenizer whose units stay the same under augmentation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechtok.training.cards import (
    Corpus,
    Figures,
    describe_data,
    facts_table,
    markdown_table,
    number,
    quality,
)
from speechtok.training.layers import pooled
from speechtok.training.recipe import Recipe
from speechtok.training.unit_probe import UED

__all__ = ["write_card"]


def write_card(
    folder: Path,
    own: Figures,
    others: Sequence[Figures],
    data: Sequence[Corpus],
    recipe: Recipe,
    command: str,
) -> Path:
    """Write ``README.md``.

    Parameters
    ----------
    folder : Path
        A bundle with ``CREDITS.md``.
    own, others : Figures
        Of this tokenizer and of those that it is compared with, its teacher first.
    data : sequence of Corpus
        Training sound.
    recipe : Recipe
        Of its training.
    command : str
        That makes it.

    Raises
    ------
    FormatError
        If the figures are those of another tokenizer.
    """
    tokenizer = own.of(folder)
    facts = tokenizer.training
    warm = ", and the next one goes on from its weights" if recipe.objective.get("warm_start") else ""
    parts = [
        f"# {tokenizer.name}",
        f"Units of [{facts['tokenizer']}](../{facts['tokenizer']}) that stay the same when the sound is stretched, "
        "shifted in pitch, heard in a room or in noise. The encoder is that of [w2vbert-mini](../w2vbert-mini), whose "
        "weights lie in its folder: keep both side by side. Blocks that were trained on top of it name the units "
        "(Gat et al. 2023, arXiv:2209.15483, without the CTC blank).",
        facts_table(tokenizer, folder, own),
        "## Data",
        f"{describe_data(data, True)} The makers of the room responses that it was convolved with stand there, too.",
        "## Recipe",
        f"`speechtok train invariant`, recipe `{facts['recipe']}`, seed {facts['seed']}: the encoder stays as it is; a "
        f"student ({recipe.objective['blocks']} conformer blocks and a linear map) learns by CTC to give augmented "
        "sound the units that its teacher gives clean sound. In each round the student of the one before is the "
        f"teacher{warm}. A round has {recipe.run.steps:,} steps of {recipe.data.batch_seconds:g} s. Unit edit "
        "distances in % on the dev split, by which rounds end:",
        _rounds(facts["rounds"]),
        f"To make it again: `{command}`.",
        "## Measured quality",
        _against(own, others[0]),
        quality(own, others),
        "## Limits",
        "Invariance was trained for the four kinds of change in the table, at their usual strengths; others (codecs, "
        "clipping, other languages, music) were not. Units are those of a small encoder from little speech "
        f"({sum(corpus.hours for corpus in data):.1f} h of read English): models that heard a thousand times more tell "
        "phones apart better. Units do not tell frames (`invertible` is false): a vocoder is trained on the units.",
    ]
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _rounds(table: Sequence[dict[str, Any]]) -> str:
    families = [name.removeprefix(f"{UED}_") for name in table[0] if name.startswith(f"{UED}_")]
    rows = [
        (
            f"{row['round'] or 'k-means'}{', left out: ' + row['left_out'] if 'left_out' in row else ''}",
            *(number(row[f"{UED}_{family}"], 1) for family in families), number(row[UED], 1),
            number(row["perplexity"], 1), number(row["runs_per_second"], 1),
        )
        for row in table
    ]  # fmt: skip
    return markdown_table(["round", *families, "mean", "perplexity", "runs/s"], rows)


def _against(own: Figures, teacher: Figures) -> str:
    """Unit edit distances beside those of the teacher."""
    groups = [pooled(figures.units) for figures in (own, teacher)]
    rows = [
        (family, number(was["ued"], 1), number(found["ued"], 1), f"{100 * (found['ued'] / was['ued'] - 1):+.1f} %")
        for (family, found), was in zip(groups[0]["ued"].items(), groups[1]["ued"].values(), strict=True)
    ]
    phones = [group["without_silence"]["pnmi_miller_madow"] for group in groups]
    return (
        f"Unit edit distance in % on the evaluation split, all speech; noises and rooms of its own split:\n\n"
        f"{markdown_table(['change', teacher.units['tokenizer'], own.units['tokenizer'], 'relative'], rows)}\n\n"
        f"PNMI without silence {phones[0]:.3f} instead of {phones[1]:.3f} ({100 * (phones[0] / phones[1] - 1):+.1f} %)."
    )
