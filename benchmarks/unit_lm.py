"""A small masked language model of units, and classifiers of whole sequences that begin with it or without it."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from speechtok.nn.transformer import Block, SelfAttention
from speechtok.training.masking import draw_mask

__all__ = ["LONGEST", "Classifier", "UnitEncoder", "classes_of", "fine_tune", "hide", "means_of", "padded", "pretrain"]

Ints = NDArray[np.int64]

WIDTH, INNER, HEADS, BLOCKS = 128, 256, 4, 2
LONGEST = 160  # units that are read of a sequence
HIDDEN, SPAN = 0.1, 3  # share of units at which hidden spans begin, and their length: about 27 % are hidden
ROWS, CROPS = 8, 32  # of a batch: labelled sequences, and crops for pre-training
DROPOUT, DECAY, WARMUP, CLIP = 0.1, 0.01, 0.1, 1.0


class UnitEncoder(nn.Module):
    """Transformer encoder of unit sequences, pre-LN, with learned positions.

    Parameters
    ----------
    units : int
        Vocabulary; the id behind the last one stands for what is hidden.
    """

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units = units
        self.embed = nn.Embedding(units + 1, WIDTH)
        self.places = nn.Parameter(torch.empty(LONGEST, WIDTH))
        for weight in (self.embed.weight, self.places):
            nn.init.normal_(weight, std=WIDTH**-0.5)
        self.blocks = nn.ModuleList(
            Block(SelfAttention(WIDTH, HEADS), WIDTH, INNER, activation="gelu", eps=1e-5, pre_norm=True)
            for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Map ids int64 [B, T], T at most `LONGEST`, of valid lengths int64 [B], to float32 [B, T, D]."""
        keys = (torch.arange(ids.shape[1]) < lengths[:, None])[:, None, None]
        x = self.embed(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, keys, None)
        return self.norm(x)


class Classifier(nn.Module):
    """An encoder and a linear map of the mean over its positions."""

    def __init__(self, encoder: UnitEncoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(WIDTH, classes)

    def means(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Means over positions: ids int64 [B, T], lengths int64 [B] -> float32 [B, D]."""
        valid = torch.arange(ids.shape[1]) < lengths[:, None]
        return (self.encoder(ids, lengths) * valid[..., None]).sum(1) / lengths[:, None]

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores of classes, float32 [B, C]."""
        return self.head(self.means(ids, lengths))


def padded(sequences: Sequence[Ints]) -> tuple[Tensor, Tensor]:
    """A batch of sequences of at least one unit: ids int64 [B, T] with zeros behind, lengths int64 [B]."""
    rows = [torch.from_numpy(np.asarray(sequence[:LONGEST], np.int64)) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def hide(ids: Tensor, lengths: Tensor, units: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Put the id `units` in the place of spans of valid units.

    Returns
    -------
    ids : int64 [B, T]
        What the model sees.
    hidden : bool [B, T]
        What it is asked for; at least one unit of each row.
    """
    hidden = torch.zeros(ids.shape, dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        hidden[row, :length] = torch.from_numpy(draw_mask(length, HIDDEN, SPAN, generator))
    return ids.masked_fill(hidden, units), hidden


def pretrain(
    units: int, sequences: Sequence[Ints], held_out: Sequence[Ints], *, updates: int, rate: float, seed: int
) -> tuple[UnitEncoder, dict[str, Any]]:
    """Train a masked language model on crops of sequences, drawn uniformly.

    Returns
    -------
    UnitEncoder
    dict
        Units read, and on hidden units of the held-out sequences: cross-entropy (nats) and accuracy, beside those of
        always saying how often units are in `sequences`.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    encoder = UnitEncoder(units)
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(WIDTH, units)})
    read = 0

    def loss() -> Tensor:
        nonlocal read
        rows = []
        for one in generator.integers(len(sequences), size=CROPS):
            first = generator.integers(max(1, len(sequences[one]) - LONGEST + 1))
            rows.append(sequences[one][first : first + LONGEST])
        ids, lengths = padded(rows)
        read += int(lengths.sum())
        seen, hidden = hide(ids, lengths, units, generator)
        return F.cross_entropy(model["head"](encoder(seen, lengths)[hidden]), ids[hidden])

    _minimise(model, loss, updates, rate)
    counts = np.bincount(np.concatenate(sequences), minlength=units) + 1.0
    shares = torch.from_numpy(counts / counts.sum()).float().log()
    told: dict[str, list[Tensor]] = {name: [] for name in ("loss", "right", "unigram_loss", "unigram_right")}
    generator = np.random.default_rng(seed)
    with torch.inference_mode():
        for begin in range(0, len(held_out), CROPS):
            ids, lengths = padded(held_out[begin : begin + CROPS])
            seen, hidden = hide(ids, lengths, units, generator)
            wanted = ids[hidden]
            scores = model["head"](encoder(seen, lengths)[hidden])
            told["loss"].append(F.cross_entropy(scores, wanted, reduction="none"))
            told["right"].append((scores.argmax(1) == wanted).float())
            told["unigram_loss"].append(-shares[wanted])
            told["unigram_right"].append((wanted == shares.argmax()).float())
    figures = {name: float(torch.cat(values).mean()) for name, values in told.items()}
    return encoder, {"units_read": read, "held_out": figures}


def fine_tune(
    encoder: UnitEncoder, sequences: Sequence[Ints], labels: Ints, classes: int, *, updates: int, rate: float, seed: int
) -> Classifier:
    """Train a copy of an encoder and a new head to tell classes; every update draws a batch of these items."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    model = Classifier(deepcopy(encoder), classes)
    for block in model.encoder.blocks:
        cast(Block, block).set_dropout(DROPOUT)

    def loss() -> Tensor:
        chosen = generator.integers(len(sequences), size=ROWS)
        return F.cross_entropy(model(*padded([sequences[i] for i in chosen])), torch.from_numpy(labels[chosen]))

    _minimise(model, loss, updates, rate)
    return model


def _minimise(model: nn.Module, loss: Any, updates: int, rate: float) -> None:
    """AdamW with a linear rise and fall of the learning rate; the model is left in its evaluation mode."""
    solver = torch.optim.AdamW(model.parameters(), weight_decay=DECAY)
    model.train()
    for update in range(updates):
        risen, left = (update + 1) / (WARMUP * updates), (updates - update) / ((1 - WARMUP) * updates)
        for group in solver.param_groups:
            group["lr"] = rate * min(1.0, risen, left)
        solver.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        solver.step()
    model.eval()


def classes_of(model: Classifier, sequences: Sequence[Ints]) -> Ints:
    """The class that a model gives each sequence, int64 [N]."""
    with torch.inference_mode():
        found = [model(*padded(sequences[i : i + CROPS])).argmax(1) for i in range(0, len(sequences), CROPS)]
    return torch.cat(found).numpy()


def means_of(encoder: UnitEncoder, sequences: Sequence[Ints]) -> NDArray[np.float64]:
    """Means over the positions of an encoder, float64 [N, D]."""
    model = Classifier(encoder, 1).eval()
    with torch.inference_mode():
        found = [model.means(*padded(sequences[i : i + CROPS])) for i in range(0, len(sequences), CROPS)]
    return torch.cat(found).double().numpy()
