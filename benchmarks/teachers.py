"""What the parts of MERT's training are worth: the recipe without one of them, at one equal, short budget.

Every row has the recipe's data order, schedule and number of steps. Reported per row: what is learned of the teachers
on held-out sound, and probes of the encoder's layers on notes (see `speechtok.evaluation.probe`), beside the encoder
before its first step. The objective changes with the rows, so losses are no measure between them.
"""

from pathlib import Path
from typing import Any

from speechtok.benchmarks.runner import lines, machine, parser, share, write

from speechtok.evaluation.probe import compare, tasks_of
from speechtok.training.music import KIND, pretrain_mert
from speechtok.training.recipe import Recipe, parse_changes
from speechtok.training.splits import MUSIC, listed, write_manifest

ROWS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "no CQT teacher": {"objective.cqt_weight": 0.0},
    "no acoustic teacher": {"objective.acoustic_weight": 0.0},
    "no mixture": {"objective.mixture_probability": 0.0},
    "no CQT input": {"model.feature_extractor_cqt": False},
}
UNTRAINED = "before the first step"


def main() -> None:
    """Run and report."""
    options = parser(__doc__)
    options.add_argument("--recipe", default="mert-mini-cpu")
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--teacher", default="codec-mini")
    options.add_argument("--runs", type=Path, default=Path("runs/teachers"))
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--row", action="append", choices=list(ROWS), help="default all")
    options.add_argument("--task", action="append", help="default pitch_class, octave and instrument_family")
    options.add_argument("--device", default="cpu")
    options.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="in all rows")
    chosen = options.parse_args()
    budget: dict[str, Any] = {"run.steps": chosen.steps, "run.evaluate_every": chosen.steps}
    budget |= {"run.checkpoint_every": chosen.steps, **parse_changes(chosen.set)}
    encoders: dict[str, Path] = {}
    table: dict[str, dict[str, Any]] = {}
    for name in chosen.row or ROWS:
        encoders[name], table[name] = _train(chosen, name, {**budget, **ROWS[name]})
    untrained = {**budget, "run.steps": 1, "optimizer.learning_rate": 1e-12}
    encoders[UNTRAINED], _ = _train(chosen, UNTRAINED, untrained)
    table[UNTRAINED] = {}
    tasks = tasks_of(chosen.task or ["pitch_class", "octave", "instrument_family"])
    notes = chosen.data / MUSIC[1]
    # One by one: each is told apart by its folder, and the folds are the same.
    for name, encoder in encoders.items():
        table[name]["probes"] = {
            one["task"]: {
                "layers": {layer: figures["accuracy"] for layer, figures in one["layers"].items()},
                "chosen": {key: one["chosen"][key] for key in ("accuracy", "interval", "layer")},
                "majority": one["majority"]["accuracy"],
            }
            for one in compare(notes, [str(encoder)], tasks, device=chosen.device)
        }
    recipe = Recipe.read(chosen.recipe, KIND, budget).as_dict()
    write(chosen.json, {"recipe": recipe, "rows": table, "machine": machine()})


def _train(chosen: Any, name: str, values: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Train one row: its encoder, and the last figures on held-out sound."""
    folder = chosen.runs / name.replace(" ", "-")
    teacher = None if values.get("objective.acoustic_weight") == 0 else chosen.teacher
    for part in ("waves", "codes") if teacher else ("waves",):
        share(chosen.runs, folder, part)
    train, watched = (
        write_manifest(
            chosen.data, [path for kind in MUSIC for path in listed(chosen.data, kind, split)],
            chosen.runs / f"{split}.jsonl",
        )
        for split in ("train", "valid")
    )  # fmt: skip
    encoder = pretrain_mert(
        chosen.recipe, train, folder, teacher=teacher, held_out=watched, changes=values, device=chosen.device
    )
    last = lines(folder, "held out")[-1]
    told = ("step", "accuracy", "majority", "guess_perplexity", "cqt_r2")
    return encoder, {"held_out": {key: last[key] for key in told if key in last}}


if __name__ == "__main__":
    main()
