"""Train a quantizer whose units stay the same under augmentation, on a frozen encoder: rounds of CTC, or NAST."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from speechtok.audio.augment import FAMILIES, AugmentResources
from speechtok.corpus.engine import Event
from speechtok.devices import usable_device
from speechtok.encoders.base import Encoder
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.errors import InputError, OutputError
from speechtok.hub import load
from speechtok.quantizers.mlp import MlpQuantizer
from speechtok.tokenizer import Tokenizer
from speechtok.training.augmented import AugmentedFrames, identity_of
from speechtok.training.beginning import same_beginning
from speechtok.training.ctc_units import CtcConfig, CtcObjective, NamedFrames
from speechtok.training.distributed import one_at_a_time
from speechtok.training.loop import train
from speechtok.training.nast import NastConfig, NastObjective
from speechtok.training.recipe import Recipe, section
from speechtok.training.unit_probe import UED, steadiness
from speechtok.training.unit_student import UnitStudent

__all__ = ["KIND", "InvariantConfig", "train_invariant"]

logger = logging.getLogger(__name__)

KIND = "invariant"
TOKENIZER = "tokenizer"
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
    blocks : int
        Conformer blocks that learn on top of the encoder's layer (before its smoothing and projection, which leave out
        what tells augmented sound from clean) and become the last ones of the new tokenizer's encoder; w2v-BERT
        encoders only. 0: a network on the encoder's single frames, as published.
    smoothing : int
        Frames that the output of these blocks is averaged over, see `W2vBertConfig`.
    dropout : float
        In these blocks.
    hidden : tuple of int
        Sizes of the layers inside of the quantizer's network.
    rounds : int
        CTC only: each takes the student of the one before as its teacher. Rounds end early when edit distances no
        longer fall or the perplexity of the units falls by more than a tenth; the round that showed it is left out.
    warm_start : bool
        From the second round on, students begin with the weights of their teacher, and so learn on, instead of anew.
    """

    method: str = "ctc"
    families: tuple[str, ...] = FAMILIES
    copies: int = 1
    blocks: int = 0
    smoothing: int = 1
    dropout: float = 0.0
    hidden: tuple[int, ...] = (256, 256)
    rounds: int = 3
    warm_start: bool = False

    def __post_init__(self) -> None:
        if self.method not in ("ctc", "nast"):
            raise InputError(f"[objective] method {self.method!r}: known are ctc and nast")
        if min(self.copies, self.rounds, *self.hidden, 1) < 1 or self.blocks < 0 or not self.families:
            raise InputError("[objective] copies, rounds, hidden must be positive, blocks not negative, families some")
        if not self.blocks and (self.smoothing != 1 or self.dropout):
            raise InputError("[objective] smoothing and dropout are those of blocks; leave them out")
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
        Of the run; gets ``frames``, for each round a run (see `speechtok.training.loop.train`) with its own
        ``tokenizer``, and ``tokenizer``, the last one that was no worse.
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
    encoder = _layer_alone(first.encoder) if config.blocks else first.encoder
    units = settings.units if isinstance(settings, NastConfig) else first.vocab_size
    _with_blocks(encoder, _student(encoder, config, units))  # refused now, not after hours
    with one_at_a_time(folder):
        sound = _heard("train", data, encoder, config, noise, rooms, folder, device, on_event)
        watched = (
            sound if held_out is None
            else _heard("held_out", held_out, encoder, config, noise, rooms, folder, device, on_event)
        )  # fmt: skip
        begun = {"train": identity_of(folder / "frames" / "train"), "tokenizer": first.fingerprint}
        same_beginning(folder, begun)
    statistics = _statistics(sound, chosen.run.seed)
    teacher: Callable[[NDArray[np.float32]], NDArray[np.int32]] = partial(_first_units, first, bool(config.blocks))
    table: list[dict[str, Any]] = [{"round": 0, **steadiness(teacher, watched, first.vocab_size)}]
    training = {
        "recipe": Path(recipe).stem, "tokenizer": first.name, "tokenizer fingerprint": first.fingerprint,
        "method": config.method, "seed": chosen.run.seed, "encoder": first.training.get("encoder"),
    }  # fmt: skip
    made: Tokenizer | None = None
    student: UnitStudent | None = None
    for number in range(1, config.rounds + 1):
        torch.manual_seed(chosen.run.seed + number)
        run = folder / f"round-{number}"
        objective: CtcObjective | NastObjective
        heard: list[NamedFrames] | list[AugmentedFrames]
        previous, student = student, _student(encoder, config, units)
        if config.warm_start and previous is not None:
            student.load_state_dict(previous.state_dict())
        else:
            student.standardize(*statistics)
        if isinstance(settings, CtcConfig):
            objective = CtcObjective(settings, student)
            heard = [NamedFrames(frames, teacher) for frames in (sound, watched)]
        else:
            objective = NastObjective(settings, student, *statistics)
            heard = [sound, watched]

        def probe(trained: nn.Module) -> dict[str, float]:
            return steadiness(cast(CtcObjective | NastObjective, trained).student.name, watched, units)

        train(objective, chosen, heard[0], run, held_out=heard[1], probe=probe, device=device, on_event=on_event)
        student.cpu().eval().round_weights()
        table.append({"round": number, **probe(objective)})
        if config.method == "ctc" and (reason := _worse(table[-2], table[-1])):
            logger.warning("%s: round %d is left out: %s", folder, number, reason)
            table[-1]["left_out"] = reason
            break
        made = Tokenizer(
            _with_blocks(encoder, student), MlpQuantizer(student.mlp), name=name, window=first.window,
            licence=first.licence, training=training | {"rounds": list(table)},
        )  # fmt: skip
        made.save(run / TOKENIZER)
        teacher = student.name
    if made is None:
        raise OutputError(f"{folder}: the first round made units no steadier ({table[-1]['left_out']}); train longer")
    made.training["rounds"] = table
    return made.save(folder / TOKENIZER)


def _layer_alone(encoder: Encoder) -> Encoder:
    """The same encoder, its layer neither smoothed nor projected."""
    if not isinstance(encoder, W2vBertEncoder) or not encoder.layer or encoder.gates:
        raise InputError(
            f"[objective] blocks stand on those of a w2v-BERT encoder, not on frames of {encoder.type}; set blocks = 0"
        )
    other = W2vBertEncoder(replace(encoder.config, smoothing=1, projected_layer=0, projection_size=0), encoder.layer)
    names = other.state_dict().keys()
    other.load_state_dict({name: value for name, value in encoder.state_dict().items() if name in names})
    return other.eval()


def _student(encoder: Encoder, config: InvariantConfig, units: int) -> UnitStudent:
    """A new student on frames of an encoder."""
    blocks = []
    if isinstance(encoder, W2vBertEncoder):
        blocks = [encoder.new_block(config.dropout) for _ in range(config.blocks)]
    return UnitStudent(encoder.dim, config.hidden, units, blocks, config.smoothing)


def _with_blocks(encoder: Encoder, student: UnitStudent) -> Encoder:
    """The encoder with the student's blocks on top."""
    if not isinstance(encoder, W2vBertEncoder) or not student.blocks:
        return encoder
    layers = encoder.layer + len(student.blocks)
    other = W2vBertEncoder(replace(encoder.config, num_hidden_layers=layers, smoothing=student.smoothing), layers)
    weights = encoder.state_dict()
    for name, value in student.blocks.state_dict().items():
        index, rest = name.split(".", 1)
        weights[f"encoder.layers.{encoder.layer + int(index)}.{rest}"] = value
    other.load_state_dict(weights)
    return other.eval()


@torch.inference_mode()
def _first_units(tokenizer: Tokenizer, layer_alone: bool, frames: NDArray[np.float32]) -> NDArray[np.int32]:
    """What the tokenizer calls frames [T, D] of its encoder or of `_layer_alone`: int32 [T]."""
    rows, encoder = torch.from_numpy(frames)[None], tokenizer.encoder
    if layer_alone:
        encoder = cast(W2vBertEncoder, encoder)
        beside = encoder.config.smoothing // 2
        # The first and the last frame stand for those beyond, which are not kept.
        rows = F.pad(rows.mT, (beside, beside), mode="replicate").mT
        rows = encoder.answer(rows)
    return tokenizer.quantizer(rows).ids[0, 0].numpy()


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
        copies=config.copies, device=device, on_event=on_event,
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


def _statistics(sound: AugmentedFrames, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and deviation of clean frames, float32 [D] each."""
    chosen = np.random.default_rng(seed).permutation(len(sound.lengths))[:_STATISTICS_ITEMS]
    rows = np.concatenate([sound.whole(int(item), 0) for item in np.sort(chosen)])
    deviation = rows.std(0)
    if not deviation.any():
        raise InputError("the encoder gives the same frame everywhere: there is nothing to quantize")
    return rows.mean(0), np.maximum(deviation, 1e-3 * deviation.max())


def _worse(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Why a round is no progress; empty if it is."""
    if after["perplexity"] < _LEAST_PERPLEXITY * before["perplexity"]:
        return f"unit perplexity fell from {before['perplexity']:.1f} to {after['perplexity']:.1f}"
    if after[UED] >= before[UED]:
        return f"the edit distance did not fall ({before[UED]:.1f} to {after[UED]:.1f} %)"
    return ""
