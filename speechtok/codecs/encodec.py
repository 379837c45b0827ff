"""Published EnCodec models as a whole (Défossez et al. 2022, arXiv 2210.13438), as transformers' ``EncodecModel``.

The 24 kHz model is causal and encodes a sound in one piece; it can be taken apart into a tokenizer. The 48 kHz model
(stereo) sees one second at a time, whose level it takes out first: seconds overlap by 1 %, and each has its scale. So
its units alone do not say what the sound was, and it encodes and decodes here only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import ceil, floor, log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speechtok.encoders.checkpoint import check_weights, fold_weight_norm, read_json, read_tensors
from speechtok.encoders.pretrained import download
from speechtok.errors import AudioError, CheckpointError, FormatError, InputError
from speechtok.nn.seanet import SeanetConfig, SeanetDecoder, SeanetEncoder
from speechtok.quantizers.residual import ResidualQuantizer

__all__ = ["Encodec", "EncodecConfig", "EncodedChunk", "read_encodec"]

_BOOK = "quantizer.layers.{}.codebook.{}"
_OVERLAP_EDGE = 1e-8  # of a scale, as published: silence is not divided by zero


@dataclass(frozen=True)
class EncodecConfig:
    """What a published configuration says besides the networks.

    Parameters
    ----------
    seanet : SeanetConfig
    codebook_size : int
        Codes of each book.
    codebooks : int
        As many as the highest bandwidth takes.
    normalize : bool
        Whether each chunk is divided by its level.
    chunk_samples, chunk_step : int or None
        Samples of a chunk, and from one chunk to the next; None: a sound is one chunk.
    """

    seanet: SeanetConfig
    codebook_size: int
    codebooks: int
    normalize: bool = False
    chunk_samples: int | None = None
    chunk_step: int | None = None

    @staticmethod
    def from_hf(description: Mapping[str, Any]) -> "EncodecConfig":
        """From the contents of a ``config.json``.

        Raises
        ------
        CheckpointError
            If it is none of EnCodec or has unusable values.
        """
        if description.get("model_type") != "encodec":
            raise CheckpointError(f"model_type={description.get('model_type')!r} is not encodec; check config.json")
        known = {field.name for field in fields(SeanetConfig)}
        values = {name: value for name, value in description.items() if name in known}
        values["sample_rate"] = description.get("sampling_rate", 24000)
        try:
            seanet = SeanetConfig(**values)
            size, rates = description.get("codebook_size", 1024), description.get("target_bandwidths", [24.0])
            dim = description.get("codebook_dim")
            if dim not in (None, seanet.hidden_size):
                raise CheckpointError(f"codebook_dim={dim} is not hidden_size={seanet.hidden_size}; check config.json")
            if type(size) is not int or size < 2 or size & (size - 1):
                raise CheckpointError(f"codebook_size={size!r} is not a power of 2; check config.json")
            # kbit/s of the best, by the bits of all books per second.
            books = int(1000 * rates[-1] // (ceil(seanet.sample_rate / seanet.hop) * int(log2(size))))
            seconds, overlap = description.get("chunk_length_s"), description.get("overlap")
            whole = None if seconds is None else int(seconds * seanet.sample_rate)
            step = None if whole is None or overlap is None else max(1, int((1.0 - overlap) * whole))
            normalize = bool(description.get("normalize", False))
        except (TypeError, ValueError, LookupError) as error:
            raise CheckpointError(f"the configuration of EnCodec is malformed ({error}); check config.json") from error
        cut = whole is None or (whole > 0 and step is not None and overlap is not None and 0 <= overlap < 1)
        if books < 1 or (whole is None) != (step is None) or not cut:
            raise CheckpointError(
                f"target_bandwidths={rates}, chunk_length_s={seconds}, overlap={overlap}: they do not make an EnCodec; "
                "check config.json"
            )
        return EncodecConfig(seanet, size, books, normalize, whole, step)

    def books_for(self, bandwidth: float) -> int:
        """Codebooks that fit into so many kbit/s; InputError if there are not so many."""
        per_book = log2(self.codebook_size) * ceil(self.seanet.sample_rate / self.seanet.hop)
        books = max(1, floor(bandwidth * 1000 / per_book))
        if books > self.codebooks:
            raise InputError(f"{bandwidth} kbit/s takes {books} codebooks, there are {self.codebooks}; give less")
        return books


@dataclass(frozen=True)
class EncodedChunk:
    """One chunk of a sound.

    Parameters
    ----------
    ids : int32 [K, T]
    scale : float or None
        The level that was taken out, where the model does that.
    """

    ids: Tensor
    scale: float | None


class Encodec(nn.Module):
    """An EnCodec model: waves to ids and back.

    Parameters
    ----------
    config : EncodecConfig
    encoder : SeanetEncoder
    quantizer : ResidualQuantizer
    decoder : SeanetDecoder
    """

    def __init__(
        self, config: EncodecConfig, encoder: SeanetEncoder, quantizer: ResidualQuantizer, decoder: SeanetDecoder
    ) -> None:
        super().__init__()
        self.config, self.encoder, self.quantizer, self.decoder = config, encoder, quantizer, decoder

    @property
    def sample_rate(self) -> int:
        """Of the waves (Hz)."""
        return self.config.seanet.sample_rate

    @property
    def channels(self) -> int:
        """Of the waves."""
        return self.config.seanet.audio_channels

    @torch.inference_mode()
    def encode(self, wave: Tensor, *, codebooks: int | None = None) -> list[EncodedChunk]:
        """Ids of a sound.

        Parameters
        ----------
        wave : float32 [channels, N]
            At `sample_rate`, in [-1, 1].
        codebooks : int, optional
            Use the first so many, see `EncodecConfig.books_for`; None: all.

        Returns
        -------
        list of EncodedChunk
            One after the other; one of all for models without chunks. Of ``ceil(n / hop)`` frames each.

        Raises
        ------
        AudioError
            If the wave has another shape or no samples.
        InputError
            If there are not so many codebooks.
        """
        if wave.ndim != 2 or wave.shape[0] != self.channels or wave.shape[1] == 0:
            raise AudioError(f"this EnCodec takes waves [{self.channels}, samples], not {tuple(wave.shape)}")
        books = self.config.codebooks if codebooks is None else codebooks
        if not 1 <= books <= self.config.codebooks:
            raise InputError(f"codebooks={codebooks}: there are {self.config.codebooks}")
        total = wave.shape[1]
        length, step = self.config.chunk_samples or total, self.config.chunk_step or total
        return [self._encode_chunk(wave[None, :, at : at + length], books) for at in range(0, total, step)]

    def _encode_chunk(self, wave: Tensor, books: int) -> EncodedChunk:
        scale = None
        if self.config.normalize:
            level = wave.mean(1).pow(2).mean().sqrt() + _OVERLAP_EDGE
            wave, scale = wave / level, float(level)
        frames = self.encoder(wave).transpose(1, 2)
        return EncodedChunk(self.quantizer(frames).ids[0, :books], scale)

    @torch.inference_mode()
    def decode(self, chunks: Sequence[EncodedChunk]) -> Tensor:
        """Sound of ids: float32 [channels, N], N a whole number of frames for each chunk.

        Where chunks overlap, one is faded into the next.

        Raises
        ------
        FormatError
            If there are no chunks, or several for a model that has one.
        """
        if not chunks or (len(chunks) > 1 and self.config.chunk_step is None):
            raise FormatError(f"{len(chunks)} chunks cannot be decoded; give those that encode gave")
        waves = []
        for chunk in chunks:
            frames = self.quantizer.decode(chunk.ids[None])
            wave: Tensor = self.decoder(frames.transpose(1, 2))[0]
            waves.append(wave if chunk.scale is None else wave * chunk.scale)
        return waves[0] if self.config.chunk_step is None else overlap_add(waves, self.config.chunk_step)


def overlap_add(waves: Sequence[Tensor], step: int) -> Tensor:
    """Join waves [C, n] that begin every `step` samples: each weighs as a triangle over the length of the first one."""
    length = waves[0].shape[-1]
    place = torch.linspace(0, 1, length + 2, device=waves[0].device)[1:-1]
    weight = 0.5 - (place - 0.5).abs()
    total = step * (len(waves) - 1) + waves[-1].shape[-1]
    sound, weights = waves[0].new_zeros(waves[0].shape[0], total), waves[0].new_zeros(total)
    for index, wave in enumerate(waves):
        part = slice(index * step, index * step + wave.shape[-1])
        sound[:, part] += weight[: wave.shape[-1]] * wave
        weights[part] += weight[: wave.shape[-1]]
    return sound / weights


def read_encodec(path_or_name: str | Path, *, revision: str | None = None) -> Encodec:
    """Read a checkpoint of EnCodec as transformers writes it.

    Parameters
    ----------
    path_or_name : str or Path
        A folder with ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``), or ``owner/repository``.
    revision : str, optional
        Branch, tag or commit of the repository.

    Raises
    ------
    UnknownNameError
        If it is neither a path nor a repository.
    CheckpointError
        If files are missing, or keys, shapes or values are not those of the configuration.
    """
    folder = Path(path_or_name).expanduser()
    if not folder.exists():
        folder = download(str(path_or_name), revision)
    description, tensors = read_json(folder / "config.json"), read_tensors(folder)
    try:
        return from_tensors(EncodecConfig.from_hf(description), tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def from_tensors(config: EncodecConfig, tensors: Mapping[str, Tensor]) -> Encodec:
    """Put a checkpoint's tensors into a model; every key and shape must be that of the configuration.

    Weight norm is folded, in both spellings. What training keeps of the codebooks (``cluster_size``, ``embed_avg`` and
    ``inited``) must be there but is not used.

    Raises
    ------
    CheckpointError
    """
    with torch.device("meta"):
        networks = {"encoder": SeanetEncoder(config.seanet), "decoder": SeanetDecoder(config.seanet)}
    expected = {
        f"{part}.{name}": tuple(tensor.shape)
        for part, network in networks.items()
        for name, tensor in network.state_dict().items()
    }
    size, dim = config.codebook_size, config.seanet.hidden_size
    for book in range(config.codebooks):
        shapes = {"inited": (1,), "cluster_size": (size,), "embed": (size, dim), "embed_avg": (size, dim)}
        expected |= {_BOOK.format(book, name): shape for name, shape in shapes.items()}
    found = fold_weight_norm({name: tensor.float() for name, tensor in tensors.items()})
    check_weights(expected, found)
    for part, network in networks.items():
        state = {name: found[f"{part}.{name}"].clone() for name in network.state_dict()}
        network.load_state_dict(state, strict=True, assign=True)
    books = torch.stack([found[_BOOK.format(book, "embed")] for book in range(config.codebooks)])
    encoder, decoder = networks["encoder"], networks["decoder"]
    assert isinstance(encoder, SeanetEncoder) and isinstance(decoder, SeanetDecoder)  # noqa: S101, PT018
    return Encodec(config, encoder, ResidualQuantizer(books), decoder).eval()
