"""Time the codes of a residual quantizer against transformers' ``EncodecResidualVectorQuantizer``.

Random books of 1024 codes in 128 dimensions, as in EnCodec at 24 kHz (75 frames per second), and random frames. Both
sides get float32 [B, 128, T] frames as an encoder gives them, run in turns, and their ids are compared. Ours also give
the slack of each frame, which theirs do not.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from speechtok.benchmarks.runner import interleaved, machine, parser, write
from torch import Tensor

from speechtok.kernels.residual import residual_encode

DIM, CODES, RATE = 128, 1024, 75
CASES = (  # books, rows, seconds of each
    (8, 1, 1),
    (8, 1, 10),
    (8, 16, 10),
    (2, 16, 10),
    (32, 1, 10),
)


def package(books: Tensor) -> Callable[[Tensor], Tensor]:
    """Encoding by transformers' quantizer of the same books; by itself it begins with zeros, where all ids are 0."""
    from transformers import EncodecConfig
    from transformers.models.encodec.modeling_encodec import EncodecResidualVectorQuantizer

    quantizer = EncodecResidualVectorQuantizer(EncodecConfig(target_bandwidths=[len(books) * RATE * 10 / 1000]))
    layer: Any
    for layer, book in zip(quantizer.layers, books, strict=True):
        layer.codebook.embed.copy_(book)
    found: Callable[[Tensor], Tensor] = quantizer.eval().encode
    return found


def ours(frames: Tensor, books: Tensor) -> Tensor:
    """Ids [K, B, T], the order of transformers."""
    rows = frames.transpose(1, 2)
    ids, _ = residual_encode(rows.reshape(-1, DIM), books)
    return ids.view(*rows.shape[:2], len(books)).permute(2, 0, 1)


def measure(count: int, rows: int, seconds: int, repeats: int) -> dict[str, Any]:
    """One case, at the present number of threads."""
    torch.manual_seed(0)
    books = torch.randn(count, CODES, DIM) * 0.9 ** torch.arange(count)[:, None, None]
    frames = torch.randn(rows, DIM, seconds * RATE)
    theirs = partial(package(books), frames)
    with torch.inference_mode():
        equal = float((theirs() == ours(frames, books)).float().mean())
        times = interleaved({"transformers": theirs, "speechtok": partial(ours, frames, books)}, repeats)
    return {
        "equal_ids": equal,
        "milliseconds": {name: {key: 1000 * value for key, value in row.items()} for name, row in times.items()},
        "speedup": {key: times["transformers"][key] / times["speechtok"][key] for key in ("median", "min")},
        "times_real_time": rows * seconds / times["speechtok"]["median"],
    }


def main() -> None:
    """Run and report."""
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    chosen = options.parse_args()
    available = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {"machine": machine(), "dim": DIM, "codes": CODES, "threads": {}}
    for threads in chosen.threads:
        if threads > available:
            raise SystemExit(
                f"{threads} threads on {available} cores would tell nothing; leave them out with --threads"
            )
        torch.set_num_threads(threads)
        result["threads"][str(threads)] = {
            f"{count} books, {rows} x {seconds} s": measure(count, rows, seconds, chosen.repeats)
            for count, rows, seconds in CASES
        }
    write(chosen.json, result)


if __name__ == "__main__":
    main()
