"""The training loop: any objective, one or many processes, exact resume.

Every draw is a function of seed, step and row, so a run that was killed goes on as if it had not been, and two
processes see the batch of one.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from speechtok.audio.perturb import PerturbConfig
from speechtok.corpus.engine import Event
from speechtok.devices import usable_device
from speechtok.errors import InputError, OutputError
from speechtok.training.curves import draw_curves
from speechtok.training.distributed import sum_over_processes
from speechtok.training.recipe import Recipe
from speechtok.training.sampler import Crop, Sampler

__all__ = ["Objective", "Run", "Sound", "train"]

logger = logging.getLogger(__name__)

CHECKPOINT, METRICS, CONFIG = "checkpoint.pt", "metrics.jsonl", "config.json"
_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
_HELD_OUT_BATCHES = 8


class Sound(Protocol):
    """What the loop needs of a data set: items that crops can be drawn from (`Mels`, `Waves`)."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Frames of each item: [items]."""

    @property
    def rate(self) -> float:
        """Frames per second."""


class Objective(Protocol):
    """What the loop needs of an objective, besides being an `nn.Module`."""

    perturb_config: PerturbConfig | None  # the loop sets it before each step
    # An objective may also say ``partial = True``: not every parameter takes part in every step.

    def collate(self, crops: list[Crop], sound: Any, noises: Any, *, training: bool) -> dict[str, Tensor]:
        """Read and draw everything for a batch; `sound` and `noises` are the data sets that `train` was given."""

    def weight_of(self, batch: dict[str, Tensor]) -> int:
        """What sums over this batch are divided by."""

    def summary(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Readable means from the figures that the forward pass summed."""

    def alarms(self, summary: dict[str, float]) -> list[str]:
        """What is wrong with held-out figures, in words; empty if nothing is."""

    def compiled(self) -> Iterable[nn.Module]:
        """Parts that are worth compiling, if the recipe asks for it."""


@dataclass
class Run:
    """Where a run stands.

    Parameters
    ----------
    folder : Path
        Everything the run writes.
    step : int
        Updates that were done.
    history : list of dict
        Lines of ``metrics.jsonl``.
    """

    folder: Path
    step: int
    history: list[dict[str, Any]]


def train(
    objective: nn.Module,
    recipe: Recipe,
    sound: Sound,
    folder: Path,
    *,
    noises: Sound | None = None,
    held_out: Sound | None = None,
    probe: Callable[[nn.Module], dict[str, float]] | None = None,
    device: str = "cpu",
    on_event: Callable[[Event], None] = lambda event: None,
) -> Run:
    """Train, or go on with what `folder` holds.

    Parameters
    ----------
    objective : nn.Module
        An `Objective`.
    recipe : Recipe
    sound : Sound
        What is trained on, as the objective reads it.
    folder : Path
        Gets ``config.json``, ``metrics.jsonl``, ``curves.png`` and ``checkpoint.pt``.
    noises : Sound, optional
        For perturbations.
    held_out : Sound, optional
        Sound on which the loss is computed every `evaluate_every` steps, without perturbation and sampling.
    probe : callable, optional
        Further held-out figures of the objective.
    device : str
        Of this process.
    on_event : callable
        Progress: stage "train", steps, with the hours heard. Alarms go to the log as warnings.

    Returns
    -------
    Run

    Raises
    ------
    InputError
        If the numbers of the recipe do not fit the processes, or the loss is not finite.
    OutputError
        If the folder holds another run.
    """
    usable_device(device)
    accelerator = _accelerator(recipe.run.precision, device, getattr(objective, "partial", False))
    world, rank = accelerator.num_processes, accelerator.process_index
    config, parts = recipe.run, recipe.run.accumulate
    sampler = _sampler(recipe, sound, world * parts)
    run = _open(folder, recipe) if accelerator.is_main_process else Run(folder, 0, [])
    accelerator.wait_for_everyone()
    optimizer = torch.optim.AdamW(
        _groups(objective, recipe.optimizer.weight_decay), betas=recipe.optimizer.betas, eps=recipe.optimizer.eps
    )
    model, optimizer = accelerator.prepare(objective, optimizer)
    bare = accelerator.unwrap_model(model)
    checkpoint = folder / CHECKPOINT
    seen = 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=accelerator.device, weights_only=True)
        bare.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        run.step, seen = state["step"], state["seconds"]
    run.history = [line for line in run.history if line["step"] <= run.step]
    if config.compile:
        for part in bare.compiled():
            part.compile(dynamic=False)
    trained, first = 0.0, run.step
    sums: dict[str, Tensor] = {}
    for step in range(run.step, config.steps):
        begin = time.perf_counter()
        model.train()
        bare.perturb_config = recipe.perturb_at(step)
        drawn = sampler(step)
        crops = drawn[rank::world]
        read = [bare.collate(crops[i::parts], sound, noises, training=True) for i in range(parts)]
        batches = [{name: value.to(accelerator.device) for name, value in batch.items()} for batch in read]
        total = torch.tensor(float(sum(bare.weight_of(batch) for batch in batches)), device=accelerator.device)
        weight = float(sum_over_processes(total))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        for index, batch in enumerate(batches):
            # Dropout is the one draw that torch makes: it, too, must not depend on what came before.
            torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank, index]).generate_state(1)[0]))
            with accelerator.no_sync(model) if index + 1 < parts else nullcontext():
                loss, figures = model(batch, weight, step / config.steps)
                # Gradients are averaged over processes, the shares of the loss are to be added.
                accelerator.backward(loss * world)
            for name, value in {**figures, "loss": loss.detach() * weight}.items():
                sums[name] = sums.get(name, 0) + value
        norm = accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        # Before anything is changed or saved: a good checkpoint must not be lost to a broken step. With float16 the
        # scaler skips such steps by itself.
        if config.precision != "float16" and not bool(torch.isfinite(norm)):
            raise InputError(f"{folder}: the gradient is not finite at step {step + 1}; lower the learning rate")
        optimizer.step()
        optimizer.zero_grad()
        run.step, trained = step + 1, trained + time.perf_counter() - begin
        seen += sum(min(crop.length, int(sound.lengths[crop.item])) for crop in drawn) / sound.rate
        if run.step % config.log_every == 0 or run.step == config.steps:
            means = bare.summary({name: sum_over_processes(value.float()) for name, value in sums.items()})
            sums = {}
            if not math.isfinite(means["loss"]):
                raise InputError(f"{folder}: the loss is {means['loss']} at step {run.step}; lower the learning rate")
            line = {"step": run.step, "split": "train", **means, "gradient_norm": float(norm), "hours": seen / 3600}
            line |= {"learning_rate": optimizer.param_groups[0]["lr"], "steps_per_second": (run.step - first) / trained}
            _log(accelerator, run, line)
            on_event(Event("train", run.step, config.steps, f"{seen / 3600:,.1f} h heard, loss {means['loss']:.3f}"))
        if run.step % config.evaluate_every == 0 or run.step == config.steps:
            line = {"step": run.step, "split": "held out", "hours": seen / 3600}
            if held_out is not None:
                line |= _held_out(bare, held_out, recipe, accelerator)
            if probe is not None and accelerator.is_main_process:
                bare.eval()
                line |= probe(bare)
            line["alarms"] = bare.alarms(line) if held_out is not None else []
            _log(accelerator, run, line)
            for alarm in line["alarms"]:
                logger.warning("%s: step %d: %s", folder, run.step, alarm)
            accelerator.wait_for_everyone()
        if run.step % config.checkpoint_every == 0 or run.step == config.steps:
            if accelerator.is_main_process:
                state = {"model": bare.state_dict(), "optimizer": optimizer.state_dict()}
                if accelerator.scaler is not None:
                    state["scaler"] = accelerator.scaler.state_dict()
                _save({**state, "step": run.step, "seconds": seen}, checkpoint)
                draw_curves(run.history, folder / "curves.png")
            accelerator.wait_for_everyone()
    return run


def _accelerator(precision: str, device: str, partial: bool) -> Any:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise InputError("training needs accelerate; install speechtok[train]") from error
    if device.startswith("cuda:") and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        torch.cuda.set_device(device)  # accelerate takes the current one
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    parallel = DistributedDataParallelKwargs(find_unused_parameters=partial)
    return Accelerator(mixed_precision=_PRECISION[precision], cpu=device == "cpu", kwargs_handlers=[parallel])


def _sampler(recipe: Recipe, sound: Sound, multiple: int, *, seed: int = 0) -> Sampler:
    crops = tuple(round(seconds * sound.rate) for seconds in recipe.data.crop_seconds)
    batch = round(recipe.data.batch_seconds * sound.rate)
    return Sampler(sound.lengths, crops, batch, recipe.run.seed + seed, least=multiple)


def _groups(objective: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed, vectors and scalars (biases, norms, mask vector, gains) are not."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def _held_out(objective: Any, sound: Sound, recipe: Recipe, accelerator: Any) -> dict[str, float]:
    """Means over fixed batches of held-out sound, the same in every evaluation and every process."""
    sampler = _sampler(recipe, sound, 1, seed=1)
    objective.eval()
    sums: dict[str, Tensor] = {}
    for step in range(_HELD_OUT_BATCHES):
        batch = objective.collate(sampler(step), sound, None, training=False)
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        weight = objective.weight_of(batch)
        with accelerator.autocast():
            loss, figures = objective(batch, weight, 1.0)
        for name, value in {**figures, "loss": loss * weight}.items():
            sums[name] = sums.get(name, 0) + value.float()
    return objective.summary(sums)


def _open(folder: Path, recipe: Recipe) -> Run:
    """Make the run's folder, or check that what is there belongs to the same recipe."""
    config, metrics = folder / CONFIG, folder / METRICS
    wanted = json.loads(json.dumps(recipe.as_dict()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not config.exists():
            # Put in place at once: the other processes of the run may be reading it.
            partial = folder / f".{CONFIG}-{os.getpid()}"
            partial.write_text(json.dumps(wanted, indent=2) + "\n")
            partial.replace(config)
        elif json.loads(config.read_text()) != wanted:
            raise OutputError(f"{folder} holds a run of another recipe; choose another folder or delete it")
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        history = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder}: the run cannot be opened ({error})") from error
    return Run(folder, 0, history)


def _log(accelerator: Any, run: Run, line: dict[str, Any]) -> None:
    if not accelerator.is_main_process:
        return
    run.history.append(line)
    # Written anew: after a resume, lines of steps that are done again must not stand twice.
    partial = run.folder / f".{METRICS}"
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in run.history))
    partial.replace(run.folder / METRICS)


def _save(state: dict[str, Any], path: Path) -> None:
    partial = path.with_name(f".{path.name}")
    torch.save(state, partial)
    partial.replace(path)
