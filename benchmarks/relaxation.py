"""sigmaReparam, attention relaxation or neither, at learning rates up to a deliberately aggressive one.

Two questions, answered apart:

1. Training. Every row is one recipe, data order and number of steps at one learning rate, with nothing, with relaxation
   or with sigmaReparam. Reported per row: whether the run ended early, the held-out loss over the steps, the largest
   rise of the training loss above the lowest one before it, the lowest attention entropy (held out, any block) and the
   largest gradient norm. Relaxation is an identity in real arithmetic: in float32 and bfloat16 its row can differ from
   the first by rounding alone. It is there for float16 (``--set run.precision="float16"``, which needs a GPU).
2. Arithmetic. Scores of growing size are formed in float16: the largest one that plain, published (scores divided when
   they are finished) and relaxed attention keep finite, and whether the fused kernel of this machine needs any of it.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from speechtok.benchmarks.runner import lines, machine, parser, share, write
from torch import Tensor

from speechtok.errors import InputError
from speechtok.nn.transformer import attention_weights
from speechtok.training.music import KIND, pretrain_mert
from speechtok.training.recipe import Recipe, parse_changes

RELAXATION = 32.0  # of MERT-v1-330M
ROWS: dict[str, dict[str, Any]] = {
    "neither": {},
    "relaxation": {"objective.attention_relaxation": RELAXATION},
    "sigmaReparam": {"objective.sigma_reparam": True},
}


def main() -> None:
    """Run and report."""
    options = parser(__doc__)
    options.add_argument("--recipe", default="mert-mini-cpu")
    options.add_argument("--data", default="../shared/data/music/tracks/train")
    options.add_argument("--held-out", default="../shared/data/music/tracks/dev")
    options.add_argument("--teacher", default="codec-mini", help="'none': the constant-Q teacher alone")
    options.add_argument("--runs", type=Path, default=Path("runs/relaxation"))
    options.add_argument("--rates", default="1e-3,1e-2", help="learning rates, separated by commas")
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--every", type=int, default=50)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--device", default="cpu")
    options.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="in all rows")
    chosen = options.parse_args()
    # Blocks that begin with zero weights cannot be reparametrized: all rows begin alike, with random ones.
    base: dict[str, Any] = {"objective.identity_init": False, "optimizer.clip": 1e9, "optimizer.schedule": "constant"}
    base |= {"optimizer.warmup": 0.05, "run.steps": chosen.steps, "run.log_every": 1}
    base |= {"run.evaluate_every": chosen.every, "run.checkpoint_every": chosen.steps}
    if chosen.teacher == "none":
        base["objective.acoustic_weight"] = 0.0
    base |= parse_changes(chosen.set)
    table: list[dict[str, Any]] = []
    for rate in (float(text) for text in chosen.rates.split(",")):
        for name, changes in ROWS.items():
            for seed in range(chosen.seeds):
                values = {**base, **changes, "optimizer.learning_rate": rate, "run.seed": seed}
                table.append({"row": name, "learning_rate": rate, "seed": seed, **_run(chosen, name, values)})
                print(table[-1], flush=True)
    recipe = Recipe.read(chosen.recipe, KIND, base).as_dict()
    write(
        chosen.json,
        {"recipe": recipe, "training": table, "arithmetic": arithmetic(chosen.device), "machine": machine()},
    )


def _run(chosen: Any, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Train one row; figures of the run, also of one that ended early."""
    folder = chosen.runs / f"{name}-{values['optimizer.learning_rate']:g}-{values['run.seed']}"
    for part in ("waves", "codes"):
        share(chosen.runs, folder, part)
    ended = None
    teacher = None if chosen.teacher == "none" else chosen.teacher
    try:
        pretrain_mert(
            chosen.recipe, chosen.data, folder, teacher=teacher, held_out=chosen.held_out, changes=values,
            device=chosen.device,
        )  # fmt: skip
    except InputError as error:
        if "not finite" not in str(error) and "the loss is" not in str(error):
            raise
        ended = str(error)
    training, held_out = lines(folder, "train"), lines(folder, "held out")
    entropies = [v for line in held_out for k, v in line.items() if k.startswith("attention_entropy")]
    return {
        "ended_early": ended,
        "steps": len(training),
        "curve": [(line["step"], line["loss"]) for line in held_out],
        "accuracy": held_out[-1].get("accuracy") if held_out else None,
        "cqt_r2": held_out[-1].get("cqt_r2") if held_out else None,
        "largest_rise": _largest_rise([line["loss"] for line in training]),
        "lowest_attention_entropy": min(entropies, default=None),
        "largest_gradient_norm": max((line["gradient_norm"] for line in training), default=None),
        "steps_per_second": training[-1]["steps_per_second"] if training else None,
    }


def _largest_rise(losses: list[float]) -> float:
    """Most by which a loss stands above the lowest one before it."""
    lowest, rise = math.inf, 0.0
    for loss in losses:
        lowest = min(lowest, loss)
        rise = max(rise, loss - lowest)
    return rise


def arithmetic(device: str) -> dict[str, Any]:
    """Largest scores, as powers of 2, that each way to form attention keeps finite in float16."""
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "plain": lambda q, k: torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, -1),
        "published": _published,
        "relaxed": lambda q, k: attention_weights(q, k, None, RELAXATION),
        "fused": lambda q, k: F.scaled_dot_product_attention(q, k, torch.ones_like(k)),
    }
    found: dict[str, Any] = {"relaxation": RELAXATION}
    for name, way in ways.items():
        largest = 0
        for power in range(4, 27):
            size = 2.0 ** (power / 2) * 64**-0.25  # of an entry, so that a score is 2 ** power
            query = torch.full((1, 1, 8, 64), size, device=device).half()
            key = query.clone()
            key[..., ::2, :] *= -1
            if not bool(way(query, key).isfinite().all()):
                break
            largest = power
        found[name] = f"2^{largest}"
    return found


def _published(query: Tensor, key: Tensor) -> Tensor:
    """MERT's relaxation, with the maximum that its code fails to take: finished scores are divided."""
    scores = ((query * query.shape[-1] ** -0.5) @ key.mT) / RELAXATION
    return torch.softmax((scores - scores.amax(-1, keepdim=True)) * RELAXATION, -1)


if __name__ == "__main__":
    main()
