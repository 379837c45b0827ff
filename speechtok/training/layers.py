"""Which layer of an encoder gives the units that say most about phones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speechtok.corpus.engine import Event
from speechtok.corpus.sources import scan
from speechtok.encoders.pretrained import from_pretrained
from speechtok.encoders.w2v_bert import W2vBertEncoder
from speechtok.errors import InputError
from speechtok.evaluation import abx, units
from speechtok.training.kmeans import fit

__all__ = ["best", "pooled", "sweep"]

_FRAMES, _ITERATIONS = 300_000, 25  # of each fit; a rough k-means ranks layers as a thorough one does


def sweep(
    source: Path,
    aligned: Path,
    encoder: Path,
    work: Path,
    *,
    clusters: int,
    every: int = 10,
    standardize: bool = False,
    seed: int = 0,
    device: str = "cpu",
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[dict[str, Any]]:
    """Fit k-means units on every layer and measure them.

    Parameters
    ----------
    source : Path
        Training sound: a folder or manifest of plain files.
    aligned : Path
        Aligned folder on which layers are compared (see `speechtok.evaluation.alignments`).
    encoder : Path
        Folder that `speechtok.encoders.saved.save_encoder` wrote.
    work : Path
        Folder for intermediate files; layers that an interrupted sweep has finished are read back from it.
    clusters, standardize, seed
        Of the fits.
    every : int
        Fits take every n-th training file.
    device : str
    on_event : callable
        Progress.

    Returns
    -------
    list of dict
        From layer 1 to the last: ``layer``, whether its frames are ``projected``; of its units ``pnmi`` (silence
        kept, Miller-Madow), ``pnmi_without_silence``, ``perplexity``; of its frames ``abx_across`` (%, None where no
        cell can be formed).

    Raises
    ------
    InputError
        If the encoder has no layers, or data are unusable.
    """
    last = from_pretrained(encoder).layer
    if not last:
        raise InputError(f"{encoder}: this encoder has no layers to choose from")
    listing = scan(source).utterances
    work.mkdir(parents=True, exist_ok=True)
    sample, done = work / "layer-sample.jsonl", work / "layers.jsonl"
    chosen = listing[::every]
    sample.write_text("".join(json.dumps({"key": one.key, "path": one.file}) + "\n" for one in chosen))
    rows = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    for layer in range(len(rows) + 1, last + 1):
        network = from_pretrained(encoder, layer)
        tokenizer, _ = fit(
            str(sample), network, clusters, name=f"layer {layer}", standardize=standardize, sample_frames=_FRAMES,
            iterations=_ITERATIONS, restarts=1, seed=seed, device=device, on_event=on_event,
        )  # fmt: skip
        tokenizer.to(device)
        told = pooled(units.evaluate(aligned, tokenizer, on_event=on_event))
        frames = pooled(abx.evaluate(aligned, tokenizer, conditions=("across",), on_event=on_event))
        rows.append(
            {
                "layer": layer,
                "projected": isinstance(network, W2vBertEncoder) and network.projects,
                "pnmi": told["with_silence"]["pnmi_miller_madow"],
                "pnmi_without_silence": told["without_silence"]["pnmi_miller_madow"],
                "perplexity": told["codebook"]["perplexity"],
                "abx_across": frames["across"]["error"],
            }
        )
        partial = work / ".layers.jsonl"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(done)
    return rows


def best(rows: list[dict[str, Any]]) -> int:
    """Layer with the highest PNMI, the lower one of equals."""
    layer: int = max(rows, key=lambda row: row["pnmi"])["layer"]
    return layer


def pooled(result: dict[str, Any]) -> dict[str, Any]:
    """Figures of all speech together."""
    groups: dict[str, dict[str, Any]] = result["groups"]
    return groups[units.POOLED] if units.POOLED in groups else next(iter(groups.values()))
