"""Phone purity and PNMI of a tokenizer on aligned speech, by corpus, with and without silence.

Frames are labelled with the phone at their centre (forced alignments on a 10 ms grid, see the data's own notes).
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from speechtok.benchmarks.runner import parser, write

import speechtok
from speechtok.metrics.phonetic import evaluate

SILENCE = {"SIL", "SPN"}


def main() -> None:
    """Run and report."""
    options = parser(__doc__)
    options.add_argument("--tokenizer", default="mfcc-k100")
    options.add_argument("--data", type=Path, default=Path("../shared/data/speech/eval"))
    chosen = options.parse_args()
    tokenizer = speechtok.load(chosen.tokenizer)
    phones: dict[str, int] = defaultdict(lambda: len(phones))
    pairs: dict[str, list[np.ndarray]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    runs: dict[str, int] = defaultdict(int)
    for line in (chosen.data / "alignments.jsonl").open():
        entry = json.loads(line)
        corpus = entry["path"].split("/")[0]
        units = tokenizer.encode(chosen.data / entry["path"])
        centres = (units.starts_seconds + units.ends_seconds) / 2
        starts = np.array([phone[1] for phone in entry["phones"]])
        ends = np.array([phone[2] for phone in entry["phones"]])
        which = np.searchsorted(starts, centres, side="right") - 1
        inside = (which >= 0) & (centres < ends[which])
        labels = np.array([phones[phone[0]] for phone in entry["phones"]])[which[inside]]
        pairs[corpus].append(np.stack([labels, units.ids[inside]]))
        seconds[corpus] += len(units) / tokenizer.rate
        runs[corpus] += len(units.run_lengths()[0])
    silent = [phones[name] for name in SILENCE if name in phones]
    result: dict[str, Any] = {
        "tokenizer": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "data": chosen.data.name,
    }
    everything = [part for parts in pairs.values() for part in parts]
    for corpus, parts in (*pairs.items(), ("all", everything)):
        labels, units = np.concatenate(parts, axis=1)
        speech = ~np.isin(labels, silent)
        result[corpus] = {
            "without silence": evaluate(labels[speech], units[speech]),
            "with silence": evaluate(labels, units),
        }
        if corpus in runs:
            result[corpus]["runs_per_second"] = runs[corpus] / seconds[corpus]
    write(chosen.json, result)


if __name__ == "__main__":
    main()
