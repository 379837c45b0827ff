"""Train a quantizer whose units stay the same under augmentation, on a frozen encoder: rounds of CTC, or NAST."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from speechtok.audio.augment import FAMILIES, AugmentResources
from speechtok.corpus.engine import Event
from speechtok.encoders.base import Encoder
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.errors import FormatError, InputError, OutputError
from speechtok.hub import load
from speechtok.quantizers.base import Codes, Quantizer
from speechtok.quantizers.mlp import MlpQuantizer
from speechtok.tokenizer import Tokenizer, usable_device
from speechtok.training.augmented import AugmentedFrames, identity_of
from speechtok.training.beginning import same_beginning
from speechtok.training.ctc_units import CtcConfig, CtcObjective
from speechtok.training.distributed import one_at_a_time
from speechtok.training.loop import train
from speechtok.training.nast import NastConfig, NastObjective
from speechtok.training.recipe import Recipe, section
from speechtok.training.unit_probe import UED, steadiness

__all__ = ["KIND", "InvariantConfig", "train_invariant"]

logger = logging.getLogger(__name__)

KIND = "invariant"
ROUNDS = "rounds.json"
_LEAST_PERPLEXITY = 0.9  # of the round before; below, rare units are dying out
_STATISTICS_ITEMS = 400


@dataclass(frozen=True)
class InvariantConfig:
    """What both methods share.

    Parameters
    ----------
    method : {"ctc", "nast"}
        See `CtcObjective` and `NastObjective`.
    families : tuple of str
        Augmentations, see `speechtok.audio.augment`.
    copies : int
        Draws of each family for each sound.
    neighbours : int
        Frames on each side that the quantizer sees beside a frame, see `W2vBertConfig`; 0 for other encoders.
    unprojected : bool
        Read the encoder's layer before smoothing and projection, which leave out what tells augmented sound from clean
        (w2v-BERT encoders only).
    rounds : int
        CTC only: each takes the quantizer of the one before as its teacher. Rounds end early when edit distances no
        longer fall or the perplexity of the units falls by more than a tenth; the round that showed it is left out.
    """

    method: str = "ctc"
    families: tuple[str, ...] = FAMILIES
    copies: int = 1
    neighbours: int = 0
    unprojected: bool = False
    rounds: int = 3

    def __post_init__(self) -> None:
        if self.method not in ("ctc", "nast"):
            raise InputError(f"[objective] method {self.method!r}: known are ctc and nast")
        if min(self.copies, self.rounds) < 1 or self.neighbours < 0 or not self.families:
            raise InputError("[objective] copies and rounds must be positive, neighbours not negative, families some")
        if self.method == "nast" and self.rounds != 1:
            raise InputError("[objective] rounds are for method ctc; set rounds = 1")


def train_invariant(
    recipe: str | Path,
    tokenizer: str | os.PathLike[str],
    data: str | os.PathLike[str],
    folder: Path,
    *,
    name: str = "invariant",
    held_out: str | os.PathLike[str] | None = None,
    noise: str | os.PathLike[str] | None = None,
    rooms: str | os.PathLike[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    device: str = "cpu",
    on_event: Callable[[Event], None] = lambda event: None,
) -> Path:
    """Train, or go on with an interrupted run.

    Parameters
    ----------
    recipe : str or Path
        See `Recipe.read`.
    tokenizer : str or Path
        Its encoder is taken, and its units are what the first round of CTC begins with. See `speechtok.load`.
    data : path or glob
        Training sound, as for ``tokenize``.
    folder : Path
        Of the run; gets ``frames``, a run for each round (see `speechtok.training.loop.train`), ``rounds.json``, and
        ``tokenizer`` at the end.
    name : str
        Of the new tokenizer.
    held_out : path or glob, optional
        Sound on which edit distances are watched, and by which rounds end; None: a sample of the training sound.
    noise, rooms : path, optional
        See `AugmentResources.from_folders`; split train for training, valid for what is watched (train, where a listing
        has none).
    changes : mapping, optional
        See `Recipe.read`.
    device : str
    on_event : callable
        Progress.

    Returns
    -------
    Path
        The folder of the tokenizer.

    Raises
    ------
    InputError
        If recipe, tokenizer and data do not fit each other.
    OutputError
        If `folder` holds a run of another recipe, or one that began with other sound or another tokenizer.
    """
    chosen = Recipe.read(recipe, KIND, changes)
    usable_device(device)  # before hours of reading
    if chosen.perturb is not None or chosen.restart_perturb is not None or chosen.data.speeds != (1.0,) or chosen.model:
        raise InputError("[model], [perturb] and [data] speeds have no say in units; leave them out")
    names = {field.name for field in fields(InvariantConfig)}
    common = {key: value for key, value in chosen.objective.items() if key in names}
    config = section(InvariantConfig, common, "objective")
    own = {key: value for key, value in chosen.objective.items() if key not in names}
    settings: CtcConfig | NastConfig
    settings = section(CtcConfig, own, "objective") if config.method == "ctc" else section(NastConfig, own, "objective")
    first = load(str(tokenizer))
    if first.segmenter is not None or first.codebooks != 1:
        raise InputError(f"{first.name}: units of single frames with one codebook are needed")
    encoder = _other(first.encoder, 0, config.unprojected)
    wider = _other(first.encoder, config.neighbours, config.unprojected)  # refused now, not after hours
    with one_at_a_time(folder):
        sound = _heard("train", data, encoder, config, noise, rooms, folder, device, on_event)
        watched = (
            sound if held_out is None
            else _heard("held_out", held_out, encoder, config, noise, rooms, folder, device, on_event)
        )  # fmt: skip
        begun = {"train": identity_of(folder / "frames" / "train"), "tokenizer": first.fingerprint}
        same_beginning(folder, begun)
    statistics = _statistics(sound, config.neighbours, chosen.run.seed)
    begin: Quantizer = Projected(first.encoder, first.quantizer) if config.unprojected else first.quantizer
    teacher = begin
    table: list[dict[str, Any]] = [{"round": 0, **_measured(teacher, watched)}]
    for number in range(1, config.rounds + 1):
        torch.manual_seed(chosen.run.seed + number)
        objective: CtcObjective | NastObjective
        if isinstance(settings, CtcConfig):
            objective = CtcObjective(settings, teacher, encoder.dim, config.neighbours)
        else:
            objective = NastObjective(settings, encoder.dim, config.neighbours)
        objective.standardize(*statistics)

        def probe(trained: nn.Module) -> dict[str, float]:
            return _measured(MlpQuantizer(cast(CtcObjective | NastObjective, trained).mlp), watched)

        train(
            objective, chosen, sound, folder / f"round-{number}", held_out=watched, probe=probe, device=device,
            on_event=on_event,
        )  # fmt: skip
        found = MlpQuantizer(objective.mlp.cpu())
        table.append({"round": number, **_measured(found, watched)})
        if isinstance(objective, CtcObjective) and (reason := _worse(table[-2], table[-1])):
            logger.warning("%s: round %d is left out: %s", folder, number, reason)
            table[-1]["left_out"] = reason
            break
        teacher = found
    (folder / ROUNDS).write_text(json.dumps(table, indent=2) + "\n")
    if teacher is begin:
        raise OutputError(f"{folder}: the first round made units no steadier ({table[-1]['left_out']}); train longer")
    training = {
        "recipe": Path(recipe).stem, "tokenizer": first.name, "tokenizer fingerprint": first.fingerprint,
        "method": config.method, "rounds": table, "seed": chosen.run.seed, "encoder": first.training.get("encoder"),
    }  # fmt: skip
    made = Tokenizer(wider, teacher, name=name, window=first.window, licence=first.licence, training=training)
    return made.save(folder / "tokenizer")


class Projected(Quantizer):
    """Units of a w2v-BERT tokenizer from the frames of its layer before smoothing and projection.

    Parameters
    ----------
    encoder : W2vBertEncoder
    quantizer : Quantizer
        Of the tokenizer.
    """

    type = "projected"
    invertible = False

    def __init__(self, encoder: Encoder, quantizer: Quantizer) -> None:
        super().__init__()
        if not isinstance(encoder, W2vBertEncoder) or encoder.config.neighbours:
            raise InputError("[objective] unprojected is for w2v-BERT encoders whose frames are not joined")
        self.smoothing = encoder.config.smoothing
        self.projection = encoder.projection if encoder.projects else nn.Identity()
        self.quantizer, self.vocab_size = quantizer, quantizer.vocab_size
        self.dim = encoder.config.hidden_size * self.smoothing

    def config_dict(self) -> dict[str, Any]:
        return {"smoothing": self.smoothing, "quantizer": self.quantizer.config_dict()}

    def forward(self, features: Tensor) -> Codes:
        """Quantize float [B, T, smoothing D] frames, joined with the neighbours that they are smoothed over."""
        return self.quantizer(self.projection(features.unflatten(-1, (self.smoothing, -1)).mean(-2)))

    def decode(self, ids: Tensor) -> Tensor:
        """Refuse.

        Raises
        ------
        FormatError
        """
        raise FormatError("frames before smoothing and projection cannot be told from units")


def _other(encoder: Encoder, neighbours: int, unprojected: bool) -> Encoder:
    """The same encoder whose frames are joined with so many neighbours, or are those before smoothing and projection."""
    if not isinstance(encoder, W2vBertEncoder):
        if neighbours or unprojected:
            raise InputError(
                f"[objective] neighbours and unprojected are not for frames of {encoder.type}; leave them out"
            )
        return encoder
    config = replace(encoder.config, neighbours=neighbours)
    weights = encoder.state_dict()
    if unprojected:
        config = replace(config, smoothing=1, projected_layer=0, projection_size=0)
        weights = {name: value for name, value in weights.items() if not name.startswith("projection.")}
    other = W2vBertEncoder(config, encoder.layer)
    other.load_state_dict(weights)
    return other.eval()


def _heard(
    split: str,
    source: str | os.PathLike[str],
    encoder: Encoder,
    config: InvariantConfig,
    noise: str | os.PathLike[str] | None,
    rooms: str | os.PathLike[str] | None,
    folder: Path,
    device: str,
    on_event: Callable[[Event], None],
) -> AugmentedFrames:
    resources = _resources(noise, rooms, "train" if split == "train" else "valid")
    frames = AugmentedFrames.build(
        source, encoder, folder / "frames" / split, families=config.families, resources=resources,
        resources_identity=f"noise {noise}, rooms {rooms}", copies=config.copies, device=device, on_event=on_event,
    )  # fmt: skip
    if frames.failed:
        logger.warning("%s: %d files were left out; the first: %s", split, len(frames.failed), frames.failed[0])
    return frames


def _resources(
    noise: str | os.PathLike[str] | None, rooms: str | os.PathLike[str] | None, split: str
) -> AugmentResources:
    """Noises and rooms of a split; of train where a listing has none of it."""

    def given(noise: str | os.PathLike[str] | None, rooms: str | os.PathLike[str] | None) -> AugmentResources:
        try:
            return AugmentResources.from_folders(noise, rooms, split)
        except InputError:
            if split == "train":
                raise
            return AugmentResources.from_folders(noise, rooms, "train")

    return AugmentResources(given(noise, None).noises, given(None, rooms).rooms)


def _statistics(sound: AugmentedFrames, neighbours: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and deviation of clean frames, repeated for every neighbour: float32 [(2 neighbours + 1) D]."""
    chosen = np.random.default_rng(seed).permutation(len(sound.lengths))[:_STATISTICS_ITEMS]
    rows = np.concatenate([sound.whole(int(item), 0) for item in np.sort(chosen)])
    deviation = rows.std(0)
    if not deviation.any():
        raise InputError("the encoder gives the same frame everywhere: there is nothing to quantize")
    deviation = np.maximum(deviation, 1e-3 * deviation.max())
    return np.tile(rows.mean(0), 2 * neighbours + 1), np.tile(deviation, 2 * neighbours + 1)


@torch.inference_mode()
def _measured(quantizer: Quantizer, sound: AugmentedFrames) -> dict[str, float]:
    place = next(quantizer.buffers()).device

    def units(frames: NDArray[np.float32]) -> NDArray[np.int32]:
        return quantizer(torch.from_numpy(frames)[None].to(place)).ids[0, 0].cpu().numpy()

    neighbours = quantizer.dim // sound.frames.shape[1] // 2
    return steadiness(units, sound, quantizer.vocab_size, neighbours=neighbours)


def _worse(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Why a round is no progress; empty if it is."""
    if after["perplexity"] < _LEAST_PERPLEXITY * before["perplexity"]:
        return f"unit perplexity fell from {before['perplexity']:.1f} to {after['perplexity']:.1f}"
    if after[UED] >= before[UED]:
        return f"the edit distance did not fall ({before[UED]:.1f} to {after[UED]:.1f} %)"
    return ""
