"""What the steps of the shipped models share: where things lie, what decides them, how they are written."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechtok.corpus.engine import Event
from speechtok.tokenizer import Tokenizer
from speechtok.training.graph import Product
from speechtok.training.recipe import Recipe

__all__ = ["BUNDLE", "CURVES", "LICENCE", "Choices", "Job", "Places", "copy", "save_bundle", "write_table"]

LICENCE = "Apache-2.0"
CURVES = "curves.png"
BUNDLE = ("tokenizer.json", "encoder.safetensors", "quantizer.safetensors", "decoder.safetensors")


@dataclass(frozen=True)
class Places:
    """Where things lie.

    Parameters
    ----------
    data : Path
        Holds ``speech/train``, ``speech/dev``, ``speech/eval``, ``music/tracks``, ``music/notes``, ``noise``, ``rir``.
    root : Path
        Checkout whose ``assets`` and ``benchmarks/results`` are refreshed.
    runs : Path
        Folder for runs in progress and trained encoders.
    """

    data: Path
    root: Path
    runs: Path


@dataclass(frozen=True)
class Choices:
    """What decides the models besides the data.

    Parameters
    ----------
    recipe, syllable_recipe : str or Path
        Of the encoder, and of the one of syllables that begins with it.
    codec_recipe, mert_recipe : str or Path
        Of the codec, and of the encoder of music that it teaches.
    invariant_recipe : str or Path
        Of the units that stay the same under augmentation.
    few, many : int
        Vocabularies; the tokenizer that is called like the encoder has `many`, and so has that of music.
    filters : int
        Vocabulary of the LiPCoT tokenizer.
    syllables : int
        Vocabulary of the tokenizer of syllables, without its silence unit.
    standardize : bool
        Of the quantizers on the encoder.
    sample_frames, encoder_sample_frames : int
        Frames that k-means is fitted on, of baselines and of the encoder.
    iterations, restarts, seed : int
        Of k-means.
    sweep_every : int
        See `speechtok.training.layers.sweep`.
    continua : int, optional
        At most so many continua of a kind are measured; default all.
    codec_every : int
        Every n-th file of the evaluation speech is sent through the codec.
    """

    recipe: str | Path
    syllable_recipe: str | Path
    codec_recipe: str | Path
    mert_recipe: str | Path
    invariant_recipe: str | Path = "invariant-ctc"
    few: int = 100
    many: int = 500
    filters: int = 256
    syllables: int = 2000
    standardize: bool = False
    sample_frames: int = 1_000_000
    encoder_sample_frames: int = 500_000
    iterations: int = 50
    restarts: int = 3
    seed: int = 0
    sweep_every: int = 10
    continua: int | None = None
    codec_every: int = 3


@dataclass(frozen=True)
class Job:
    """What the functions of all steps need.

    Parameters
    ----------
    places : Places
    choices : Choices
    recipe, syllable_recipe, codec_recipe, mert_recipe, invariant_recipe : Recipe
        Those of the choices.
    device : str
    command : str
        What cards name as the way to make the models again.
    on_event : callable
        Progress within a step.
    """

    places: Places
    choices: Choices
    recipe: Recipe
    syllable_recipe: Recipe
    codec_recipe: Recipe
    mert_recipe: Recipe
    invariant_recipe: Recipe
    device: str
    command: str
    on_event: Callable[[Event], None]

    def speech(self, split: str) -> Path:
        """Folder of a split."""
        return self.places.data / "speech" / split

    def bundle(self, name: str) -> Path:
        """Folder of a shipped tokenizer."""
        return self.places.root / "assets" / name

    def table(self, kind: str, name: str) -> Path:
        """JSON file of figures."""
        folder = self.places.root / "benchmarks" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{kind}_{name}.json"


def copy(source: Path, target: Path) -> None:
    """Copy a file, unless it is there already."""
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def save_bundle(
    tokenizer: Tokenizer, folder: Path, curves: Path | None, report: dict[str, Any], base: str | None = None
) -> Product:
    """Put a tokenizer, and the curves of its training, in the place of what an earlier run left.

    Parameters
    ----------
    tokenizer : Tokenizer
    folder : Path
    curves : Path, optional
        Picture that goes with it.
    report : dict
        Facts of the product.
    base : str, optional
        See `Tokenizer.save`.
    """
    # A bundle never overwrites another one; the old one goes only now that the new one is there.
    for old in (*BUNDLE, CURVES):
        (folder / old).unlink(missing_ok=True)
    tokenizer.to("cpu").save(folder, base=base)
    if curves is not None:
        copy(curves, folder / CURVES)
    return Product(tuple(folder / file for file in (*BUNDLE, CURVES) if (folder / file).exists()), report)


def write_table(path: Path, tables: list[dict[str, Any]]) -> Path:
    """Write figures as the command ``evaluate`` does."""
    path.write_text(json.dumps(tables, indent=2, ensure_ascii=False) + "\n")
    return path
