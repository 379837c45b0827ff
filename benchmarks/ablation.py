"""Compare variations of a training recipe at one equal, short budget: held-out loss, and steps to the baseline's loss.

Every row is the same recipe, data order and number of steps with other values, for example

    --row "recalibration: objective.recalibration=2.0" --row "sigmaReparam: objective.sigma_reparam=true"

The first row is the recipe itself. Reported per row and seed: the held-out loss over the steps, the first step at which
it was as low as the baseline's at 25, 50, 75 and 100 % of its fall, the lowest attention entropy, the largest gradient
norm, and the phone information of every layer at the end.
"""

import statistics
from pathlib import Path
from typing import Any, cast

from speechtok.benchmarks.runner import lines, machine, parser, share, write

from speechtok.encoders import from_pretrained
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.training.mels import Mels
from speechtok.training.pretrain import KIND, pretrain
from speechtok.training.probe import PhoneProbe
from speechtok.training.recipe import Recipe, parse_changes

SHARES = (0.25, 0.5, 0.75, 1.0)


def main() -> None:
    """Run and report."""
    options = parser(__doc__)
    options.add_argument("--recipe", default="w2vbert-mini-cpu")
    options.add_argument("--data", type=Path, default=Path("../shared/data/speech"))
    options.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    options.add_argument("--row", action="append", default=[], help="NAME: SECTION.FIELD=VALUE, ...")
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--every", type=int, default=50)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--loss", default="contrastive", help="held-out figure that is compared")
    chosen = options.parse_args()
    budget: dict[str, Any] = {"run.steps": chosen.steps, "run.evaluate_every": chosen.every}
    budget["run.checkpoint_every"] = chosen.steps
    rows = {"recipe": ""} | {name.strip(): values for name, _, values in (row.partition(":") for row in chosen.row)}
    table: dict[str, Any] = {}
    baselines: dict[int, list[tuple[int, float]]] = {}
    for name, values in rows.items():
        other = parse_changes([part.strip() for part in values.split(",") if part.strip()])
        runs: list[dict[str, Any]] = []
        for seed in range(chosen.seeds):
            curve, figures = _run(chosen, name, {**budget, **other, "run.seed": seed})
            baseline = baselines.setdefault(seed, curve)
            runs.append({"seed": seed, "curve": curve, "steps_to": _steps_to(curve, baseline), **figures})
        ends = [run["curve"][-1][1] for run in runs]
        table[name] = {"changes": other, "end": statistics.mean(ends), "runs": runs}
    recipe = Recipe.read(chosen.recipe, KIND, budget).as_dict()
    write(chosen.json, {"recipe": recipe, "loss": chosen.loss, "rows": table, "machine": machine()})


def _run(chosen: Any, name: str, values: dict[str, Any]) -> tuple[list[tuple[int, float]], dict[str, float]]:
    """Train one row: held-out loss over the steps, and figures at the end."""
    folder = chosen.runs / f"{name.replace(' ', '-')}-{values['run.seed']}"
    data, watched = chosen.data / "train", chosen.data / "dev"
    share(chosen.runs, folder, "mels")
    made = pretrain(chosen.recipe, data, folder, held_out=watched, changes=values)
    encoder = cast(W2vBertEncoder, from_pretrained(made))
    speeds = Recipe.read(chosen.recipe, KIND, values).data.speeds
    projections = {encoder.config.projected_layer: encoder.projection}
    probe = PhoneProbe.read(watched, encoder, Mels.build(data, folder / "mels" / "train", speeds), clusters=(500,))
    held_out, training = lines(folder, "held out"), lines(folder, "train")
    curve = [(line["step"], line[chosen.loss]) for line in held_out]
    last = held_out[-1]
    return curve, {
        **probe(encoder, projections),
        "masked_accuracy": last.get("masked_accuracy", 0.0),
        "code_perplexity": last["code_perplexity"],
        "lowest_attention_entropy": min(
            value for line in held_out for key, value in line.items() if key.startswith("attention_entropy")
        ),
        "largest_gradient_norm": max(line["gradient_norm"] for line in training),
        "steps_per_second": training[-1]["steps_per_second"],
    }


def _steps_to(curve: list[tuple[int, float]], baseline: list[tuple[int, float]]) -> dict[str, int | None]:
    """First step at which a curve is as low as the baseline was after a share of its whole fall."""
    start, end = baseline[0][1], baseline[-1][1]
    targets = {f"{share:.0%}": start + share * (end - start) for share in SHARES}
    return {share: next((step for step, value in curve if value <= target), None) for share, target in targets.items()}


if __name__ == "__main__":
    main()
