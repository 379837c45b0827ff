"""Recipes: everything that decides a training run, read from TOML and held to account."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from speechtok.audio.perturb import PerturbConfig
from speechtok.errors import AudioError, InputError

__all__ = [
    "DataConfig", "OptimizerConfig", "Recipe", "RestartConfig", "RunConfig", "named", "parse_changes", "section",
]  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """What a step sees.

    Parameters
    ----------
    crop_seconds : tuple of float
        Lengths of the buckets, see `Sampler`.
    batch_seconds : float
        Sound in a step, over all processes and micro-batches.
    speeds : tuple of float
        See `Mels.build`.
    """

    crop_seconds: tuple[float, ...] = (2.56, 5.12, 10.24)
    batch_seconds: float = 30.72
    speeds: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not 0 < self.batch_seconds < math.inf or not self.crop_seconds or min(self.crop_seconds) <= 0:
            raise InputError("[data] batch_seconds and crop_seconds must be positive")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Parameters
    ----------
    learning_rate : float
        At the peak.
    warmup : float
        Share of the steps until then, linear.
    schedule : {"cosine", "linear", "constant"}
        From there to `final` times the peak at the last step.
    betas, eps, weight_decay, clip
        Of AdamW; gradients are scaled to a norm of at most `clip`. Vectors and scalars are not decayed.
    """

    learning_rate: float = 1e-3
    warmup: float = 0.05
    schedule: str = "cosine"
    final: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "linear", "constant"):
            raise InputError(f"[optimizer] schedule {self.schedule!r}: known are cosine, linear and constant")
        if not (0 < self.learning_rate < math.inf and self.clip > 0 and 0 <= self.warmup < 1 and 0 <= self.final <= 1):
            raise InputError("[optimizer] learning_rate and clip must be positive, warmup and final shares of 1")

    def rate(self, peak: float, step: int, steps: int) -> float:
        """Learning rate of the update number `step` (from 0) of a rise to `peak` and fall that take `steps`."""
        warmup = max(1, round(self.warmup * steps))
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        shape = {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1.0 - done, "constant": 1.0}[self.schedule]
        return peak * (self.final + (1.0 - self.final) * shape)


@dataclass(frozen=True)
class RunConfig:
    """How long and how.

    Parameters
    ----------
    steps : int
        Updates.
    seed : int
        Of everything that is drawn.
    precision : {"float32", "bfloat16", "float16"}
        Autocast.
    accumulate : int
        Micro-batches per update.
    compile : bool
        Compile the blocks.
    log_every, evaluate_every, checkpoint_every : int
        Steps.
    """

    steps: int
    seed: int = 0
    precision: str = "bfloat16"
    accumulate: int = 1
    compile: bool = False
    log_every: int = 50
    evaluate_every: int = 1000
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16", "float16"):
            raise InputError(f"[run] precision {self.precision!r}: known are float32, bfloat16 and float16")
        if min(self.steps, self.accumulate, self.log_every, self.evaluate_every, self.checkpoint_every) < 1:
            raise InputError("[run] steps, accumulate and the intervals must be at least 1")
        if self.checkpoint_every % self.log_every and self.checkpoint_every < self.steps:
            raise InputError("[run] checkpoint_every must be a multiple of log_every: a line is lost in between")


@dataclass(frozen=True)
class RestartConfig:
    """A second part of the run, with a learning rate that rises and falls again (Loshchilov and Hutter 2017).

    Perturbations that would keep a young model from learning can wait for it (``[restart_perturb]``).

    Parameters
    ----------
    step : int
        Updates of the first part; a run that is not longer has no second part.
    learning_rate : float
        At the second peak.
    """

    step: int
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.step < 1 or not 0 < self.learning_rate < math.inf:
            raise InputError("[restart] step must be at least 1 and learning_rate positive")


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Parameters
    ----------
    kind : str
        Which objective.
    model, objective : dict
        Sections that the objective reads (see `section`).
    data : DataConfig
    optimizer : OptimizerConfig
    run : RunConfig
    perturb : PerturbConfig or None
    restart : RestartConfig or None
    restart_perturb : PerturbConfig or None
        In place of `perturb` from the restart on; None: no change.
    """

    kind: str
    model: dict[str, Any]
    objective: dict[str, Any]
    run: RunConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    perturb: PerturbConfig | None = None
    restart: RestartConfig | None = None
    restart_perturb: PerturbConfig | None = None

    def __post_init__(self) -> None:
        if self.restart is None and self.restart_perturb is not None:
            raise InputError("[restart_perturb] needs [restart]")

    @property
    def noisy(self) -> bool:
        """Whether perturbations mix noise in."""
        parts = (self.perturb_at(0), self.perturb_at(self.run.steps - 1))
        return any(part is not None and part.noise_probability > 0 for part in parts)

    def learning_rate(self, step: int) -> float:
        """Learning rate of the update number `step` (from 0)."""
        steps = self.run.steps
        first = steps if self.restart is None else min(self.restart.step, steps)
        if self.restart is None or step < first:
            return self.optimizer.rate(self.optimizer.learning_rate, step, first)
        return self.optimizer.rate(self.restart.learning_rate, step - first, steps - first)

    def perturb_at(self, step: int) -> PerturbConfig | None:
        """Perturbation in the update number `step`."""
        if self.restart is not None and self.restart_perturb is not None and step >= self.restart.step:
            return self.restart_perturb
        return self.perturb

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        return {name: value for name, value in values.items() if value is not None or not name.startswith("restart")}

    @classmethod
    def read(cls, name_or_path: str | Path, kind: str, changes: Mapping[str, Any] | None = None) -> "Recipe":
        """Read a recipe.

        Parameters
        ----------
        name_or_path : str or Path
            A TOML file, or the name of a shipped recipe.
        kind : str
            The objective that it must be for.
        changes : mapping, optional
            ``{"run.steps": 100, ...}``: values that replace those of the file.

        Raises
        ------
        InputError
            If it cannot be read, or a section or field is unknown or of the wrong type; the message names it.
        """
        path = Path(name_or_path)
        if not path.is_file():
            shipped = named()
            if str(name_or_path) not in shipped:
                raise InputError(f"{name_or_path} is no file and no recipe; recipes are {', '.join(sorted(shipped))}")
            path = shipped[str(name_or_path)]
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path}: no readable TOML ({error})") from error
        for place, value in (changes or {}).items():
            part, _, key = place.rpartition(".")
            if not isinstance(table.setdefault(part, {}), dict):
                raise InputError(f"{place}: {part} is no section of a recipe")
            table[part][key] = value
        if table.pop("kind", None) != kind:
            raise InputError(f"{path}: is no recipe for {kind}; its first line must be: kind = {kind!r}")
        known = {"model", "objective", "data", "optimizer", "run", "perturb", "restart", "restart_perturb"}
        if unknown := sorted(set(table) - known):
            raise InputError(f"{path}: unknown section {unknown[0]!r}; known are {', '.join(sorted(known))}")
        for name, part in table.items():
            if not isinstance(part, dict):
                raise InputError(f"{path}: [{name}] must be a section")
        try:
            return cls(
                kind,
                table.get("model", {}),
                table.get("objective", {}),
                section(RunConfig, table.get("run", {}), "run"),
                section(DataConfig, table.get("data", {}), "data"),
                section(OptimizerConfig, table.get("optimizer", {}), "optimizer"),
                *(section(part, table[name], name) if name in table else None for name, part in _OPTIONAL.items()),
            )
        except (InputError, AudioError) as error:
            raise InputError(f"{path}: {error}") from error


_OPTIONAL: dict[str, Any] = {"perturb": PerturbConfig, "restart": RestartConfig, "restart_perturb": PerturbConfig}


def named() -> dict[str, Path]:
    """Recipes that come with the package: name -> file."""
    root = Path(str(files("speechtok.training"))) / "recipes"
    return {path.stem: path for path in sorted(root.glob("*.toml"))}


def parse_changes(values: Sequence[str] | None) -> dict[str, Any]:
    """Values for `Recipe.read` from texts like ``run.steps=100``, read as TOML; InputError where one is none."""
    result: dict[str, Any] = {}
    for value in values or []:
        place, sign, text = value.partition("=")
        try:
            result[place.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{value!r}: write SECTION.FIELD=VALUE, strings in quotes ({error})") from error
        if not sign or place.count(".") != 1:
            raise InputError(f"{value!r}: write SECTION.FIELD=VALUE")
    return result


def section(kind: type[T], values: Mapping[str, Any], name: str) -> T:
    """Make a configuration dataclass from a section; InputError where a field is unknown, missing or mistyped."""
    known = {entry.name: entry for entry in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise InputError(f"[{name}] has no field {unknown[0]!r}; known are {', '.join(known)}")
    checked = {key: _typed(value, known[key].type, f"[{name}] {key}") for key, value in values.items()}
    try:
        return kind(**checked)
    except TypeError as error:
        raise InputError(f"[{name}] {error}") from error


def _typed(value: Any, wanted: Any, place: str) -> Any:
    if get_origin(wanted) is tuple:
        inner, *others = get_args(wanted)
        if not isinstance(value, list | tuple):
            raise InputError(f"{place} is {value!r}; give a list")
        if others != [...] and len(value) != 1 + len(others):
            raise InputError(f"{place} is {value!r}; give {1 + len(others)} values")
        return tuple(_typed(entry, inner, place) for entry in value)
    kinds = get_args(wanted) or (wanted,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise InputError(f"{place} is {value!r}; give {names}")
    return value
