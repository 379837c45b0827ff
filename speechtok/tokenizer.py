"""`Tokenizer`: an encoder and a quantizer, from sound to `Units`.

Batching never changes a file's units: rows of a batch are masked, and a frame whose two nearest
centroids are closer than the rounding error (a near-tie) is decided again on one canonical path, which
is the frame's own window alone on one thread (for encoders of bounded context: the frame and its
context alone).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speechtok.audio.decode import AudioFile, as_mono, resampled
from speechtok.encoders.base import Encoder
from speechtok.errors import AudioError, CheckpointError, FingerprintError, FormatError, InputError, OutputError
from speechtok.frames import Window, WindowRule
from speechtok.quantizers.base import Quantizer
from speechtok.units import Units
from speechtok.windows import cut

if TYPE_CHECKING:
    from speechtok.streaming import Stream

__all__ = ["DEFAULT_WINDOW", "EncodedWindow", "Tokenizer"]

FORMAT = 1
DEFAULT_WINDOW = WindowRule(max_seconds=30.0, context_seconds=3.0)
# Windows are pooled and sorted by length before they are cut into batches, so that little is padded.
_POOL_BATCHES = 4

_DESCRIPTION_FIELDS = (
    "name", "fingerprint", "encoder", "encoder_config", "layer", "quantizer", "vocab_size", "sample_rate", "window",
)  # fmt: skip


@dataclass(frozen=True)
class EncodedWindow:
    """Result of one window.

    Parameters
    ----------
    ids : int32 [K, T]
        Ids of the kept frames.
    ties : int
        Kept frames that were near-ties and were decided on the canonical path.
    """

    ids: NDArray[np.int32]
    ties: int


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def usable_device(name: str | torch.device) -> torch.device:
    """Check a device by putting something on it; InputError if it cannot be used here."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"device {str(name)!r} cannot be used here ({reason}); the CPU is device 'cpu'") from error


class Tokenizer:
    """Turns sound into units.

    Parameters
    ----------
    encoder : Encoder
    quantizer : Quantizer
    name : str
    window : WindowRule
        How files longer than ``window.max_seconds`` are cut; part of the fingerprint.
    licence : str
        Of the weights.
    training : dict
        What the tokenizer was made from; for the reader, not part of the fingerprint.

    Raises
    ------
    FormatError
        If encoder and quantizer do not fit together.
    """

    def __init__(
        self,
        encoder: Encoder,
        quantizer: Quantizer,
        *,
        name: str,
        window: WindowRule = DEFAULT_WINDOW,
        licence: str = "unknown",
        training: dict[str, Any] | None = None,
    ):
        if encoder.dim != quantizer.dim:
            raise FormatError(
                f"{name}: the encoder's frames have {encoder.dim} dimensions, the quantizer expects {quantizer.dim}; "
                "encoder, layer or centroids are not those that belong together"
            )
        window.core(encoder.grid)
        self.encoder, self.quantizer = encoder.eval(), quantizer.eval()
        self.name, self.window, self.licence, self.training = name, window, licence, training or {}
        self.device = torch.device("cpu")

    @property
    def sample_rate(self) -> int:
        """Rate of the waves it reads (Hz)."""
        return self.encoder.sample_rate

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self.quantizer.vocab_size

    @property
    def rate(self) -> float:
        """Units per second (before run-length coding)."""
        return self.encoder.grid.rate

    @property
    def bitrate(self) -> float:
        """Nominal bits per second: ``rate * codebooks * log2(vocab_size)``."""
        return self.rate * self.quantizer.codebooks * float(np.log2(self.vocab_size))

    def to(self, device: str | torch.device) -> "Tokenizer":
        """Move the models to a device, in place.

        Raises
        ------
        InputError
            If this machine or this build of torch has no such device.
        """
        self.device = usable_device(device)
        self.encoder.to(self.device)
        self.quantizer.to(self.device)
        return self

    # -- encode ---------------------------------------------------------------------------------------------------

    def encode(self, source: Any, sample_rate: int | None = None) -> Units:
        """Units of one file or array.

        Parameters
        ----------
        source : path, binary stream, or samples float [N] / [N, C]
            Arrays in [-1, 1] (int16 is scaled); channels are averaged.
        sample_rate : int
            Of an array (Hz).

        Returns
        -------
        Units
            Empty if the sound is shorter than one frame.

        Raises
        ------
        AudioError
            If the sound cannot be used.
        """
        return self.encode_batch([source], sample_rate)[0]

    def encode_batch(
        self, sources: Sequence[Any], sample_rate: int | None = None, *, batch_seconds: float = 60.0
    ) -> list[Units]:
        """Units of several files or arrays, encoded together; parameters as `encode`.

        Parameters
        ----------
        batch_seconds : float
            Padded audio per batch; changes speed and memory, never the units.
        """
        jobs = (
            (i, window, wave) for i, source in enumerate(sources) for window, wave in self.windows(source, sample_rate)
        )
        parts: list[list[tuple[int, NDArray[np.int32]]]] = [[] for _ in sources]
        for index, window, encoded in self.encode_windows(jobs, batch_seconds):
            parts[index].append((window.first, encoded.ids))
        return [self.assemble(part) for part in parts]

    def windows(self, source: Any, sample_rate: int | None = None) -> Iterator[tuple[Window, NDArray[np.float32]]]:
        """Decode, resample and cut one source (see `encode`) into windows with their samples, float32 [n]."""
        if isinstance(source, str | os.PathLike) or hasattr(source, "read"):
            with AudioFile(source) as file:
                yield from cut(
                    resampled(file.blocks(), file.sample_rate, self.sample_rate), self.encoder.grid, self.window
                )
        else:
            if sample_rate is None:
                raise AudioError("an array needs its sample_rate; pass sample_rate=...")
            blocks = resampled(iter([as_mono(source)]), sample_rate, self.sample_rate)
            yield from cut(blocks, self.encoder.grid, self.window)

    def encode_windows(
        self, jobs: Iterable[tuple[Any, Window, NDArray[np.float32]]], batch_seconds: float
    ) -> Iterator[tuple[Any, Window, EncodedWindow]]:
        """Encode windows in batches of similar length; results come in any order.

        Parameters
        ----------
        jobs : iterable of (anything that names the window, window, samples float32 [n])
        batch_seconds : float
            Padded audio per batch.
        """
        limit = int(batch_seconds * self.sample_rate)
        pool: list[tuple[Any, Window, NDArray[np.float32]]] = []
        pooled = 0
        for job in jobs:
            pool.append(job)
            pooled += len(job[2])
            if pooled >= _POOL_BATCHES * limit:
                yield from self._encode_pool(pool, limit)
                pool, pooled = [], 0
        yield from self._encode_pool(pool, limit)

    def _encode_pool(
        self, pool: list[tuple[Any, Window, NDArray[np.float32]]], limit: int
    ) -> Iterator[tuple[Any, Window, EncodedWindow]]:
        pool = sorted(pool, key=lambda job: len(job[2]))
        while pool:
            # From the longest down: the batch is as wide as its first window.
            size = min(len(pool), max(1, limit // max(1, len(pool[-1][2]))))
            batch, pool = pool[-size:], pool[:-size]
            for (name, window, _), encoded in zip(
                batch, self.encode_batch_of_windows([(w, x) for _, w, x in batch]), strict=True
            ):
                yield name, window, encoded

    @torch.inference_mode()
    def encode_batch_of_windows(self, batch: Sequence[tuple[Window, NDArray[np.float32]]]) -> list[EncodedWindow]:
        """Encode windows as one padded batch and decide near-ties on the canonical path."""
        ids, ties = self._encode_waves([wave for _, wave in batch])
        # This very pass is the canonical one where the window is alone and nothing can split its sums differently.
        canonical = len(batch) == 1 and self.encoder.context is None and torch.get_num_threads() == 1
        results = []
        for (window, wave), row, tied in zip(batch, ids, ties, strict=True):
            kept = slice(window.skip, window.skip + window.count)
            where = np.flatnonzero(tied[kept]) + window.skip
            if len(where) and not canonical:
                row = row.copy()
                self._decide(wave, row, where)
            results.append(EncodedWindow(row[:, kept], len(where)))
        return results

    def _encode_waves(
        self, waves: Sequence[NDArray[np.float32]]
    ) -> tuple[list[NDArray[np.int32]], list[NDArray[np.bool_]]]:
        """Pad, encode, quantize: ids int32 [K, T] and near-ties bool [T] of each wave."""
        lengths = torch.tensor([len(wave) for wave in waves], dtype=torch.int64)
        padded = torch.zeros(len(waves), int(lengths.max()))
        for row, wave in zip(padded, waves, strict=True):
            row[: len(wave)] = torch.from_numpy(wave)
        frames = self.encoder(padded.to(self.device), lengths.to(self.device))
        codes = self.quantizer(frames.features)
        ids, margins = codes.ids.cpu().numpy(), codes.margins.cpu().numpy()
        counts = frames.lengths.tolist()
        if any(np.isnan(margins[i, :n]).any() for i, n in enumerate(counts)):
            raise CheckpointError(f"{self.name}: the encoder gave NaN frames for finite sound; its weights are damaged")
        tied = margins < self.encoder.rounding
        return [ids[i, :, :n] for i, n in enumerate(counts)], [tied[i, :n] for i, n in enumerate(counts)]

    def _decide(self, wave: NDArray[np.float32], ids: NDArray[np.int32], where: NDArray[np.intp]) -> None:
        """Overwrite near-tied frames `where` of int32 [K, T] ids by their canonical decision."""
        grid, context = self.encoder.grid, self.encoder.context
        with _one_thread():
            if context is None:
                ids[:, where] = self._encode_waves([wave])[0][0][:, where]
                return
            for frame in where.tolist():
                begin, end = max(0, frame - context), min(ids.shape[1], frame + context + 1)
                piece = wave[begin * grid.hop : begin * grid.hop + grid.num_samples(end - begin)]
                ids[:, frame] = self._encode_waves([piece])[0][0][:, frame - begin]

    def assemble(self, parts: Iterable[tuple[int, NDArray[np.int32]]], first: int = 0) -> Units:
        """Join windows, given as (first frame, ids int32 [K, T]) in any order, to `Units` from frame `first` on."""
        pieces = [ids for _, ids in sorted(parts, key=lambda part: part[0])]
        ids = np.concatenate(pieces, axis=1) if pieces else np.zeros((self.quantizer.codebooks, 0), np.int32)
        grid = self.encoder.grid
        starts = grid.offset + grid.hop * (first + np.arange(ids.shape[1], dtype=np.int64))
        flat = ids[0] if self.quantizer.codebooks == 1 else ids
        return Units(flat, starts, starts + grid.hop, self.sample_rate, self.vocab_size, self.fingerprint)

    def stream(self, sample_rate: int | None = None, *, window: WindowRule | None = None) -> "Stream":
        """Open a stream of units; see `speechtok.streaming.Stream`."""
        from speechtok.streaming import Stream

        return Stream(self, self.sample_rate if sample_rate is None else sample_rate, window=window)

    # -- save and load --------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What decides the units, besides the weights."""
        return {
            "format": FORMAT,
            "encoder": self.encoder.type,
            "encoder_config": self.encoder.config_dict(),
            "layer": self.encoder.layer,
            "quantizer": self.quantizer.type,
            "quantizer_config": self.quantizer.config_dict(),
            "window": asdict(self.window),
        }

    @cached_property
    def fingerprint(self) -> str:
        """Hash of configuration and weights, 32 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode())
        for part, module in (("encoder", self.encoder), ("quantizer", self.quantizer)):
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]

    def describe(self) -> dict[str, Any]:
        """The contents of ``tokenizer.json``: in a bundle and beside every output."""
        grid = self.encoder.grid
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            **self._identity(),
            "vocab_size": self.vocab_size,
            "codebooks": self.quantizer.codebooks,
            "sample_rate": self.sample_rate,
            "hop_seconds": grid.hop_seconds,
            "offset_seconds": grid.offset_seconds,
            "bitrate": round(self.bitrate, 3),
            "licence": self.licence,
            "training": self.training,
            "versions": {name: version(name) for name in ("speechtok", "torch", "numpy")},
        }

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the bundle: ``tokenizer.json``, ``encoder.safetensors`` (if it has weights), ``quantizer.safetensors``.

        Raises
        ------
        OutputError
            If the folder holds another tokenizer or cannot be written.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        description = folder / "tokenizer.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if description.exists() and json.loads(description.read_text()).get("fingerprint") != self.fingerprint:
                raise OutputError(f"{folder} holds another tokenizer; choose another folder or delete it")
            for part, module in (("encoder", self.encoder), ("quantizer", self.quantizer)):
                tensors = {name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}
                if tensors:
                    save_file(tensors, folder / f"{part}.safetensors")
                    (folder / f"{part}.safetensors").chmod(0o644)  # the library writes files that only the owner reads
            description.write_text(json.dumps(self.describe(), indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise OutputError(f"{folder}: the tokenizer cannot be written ({error})") from error
        return folder

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> "Tokenizer":
        """Read a bundle that `save` wrote.

        Raises
        ------
        FormatError
            If a file is missing or malformed.
        FingerprintError
            If configuration or weights are not those that the fingerprint was made of.
        """
        from speechtok.encoders.pretrained import build

        folder = Path(folder)
        description = read_description(folder)
        try:
            encoder = build(description["encoder"], description["encoder_config"], description["layer"])
            window = WindowRule(**description["window"])
        except (TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"{folder / 'tokenizer.json'}: malformed configuration ({error})") from error
        weights = _read_tensors(folder / "encoder.safetensors") if encoder.state_dict() else {}
        try:
            encoder.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise FormatError(f"{folder / 'encoder.safetensors'} does not fit its configuration: {error}") from error
        tokenizer = Tokenizer(
            encoder,
            _build_quantizer(description["quantizer"], _read_tensors(folder / "quantizer.safetensors"), folder),
            name=description["name"],
            window=window,
            licence=description.get("licence", "unknown"),
            training=description.get("training", {}),
        )
        if tokenizer.fingerprint != description["fingerprint"]:
            raise FingerprintError(
                f"{folder}: tokenizer.json says fingerprint {description['fingerprint']}, but its files give "
                f"{tokenizer.fingerprint}; the bundle is damaged or was edited, fetch or make it again"
            )
        return tokenizer


def read_description(folder: Path) -> dict[str, Any]:
    """Contents of a folder's ``tokenizer.json``, checked for the fields that everything relies on."""
    path = folder / "tokenizer.json"
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FormatError(f"{folder} is no tokenizer or output folder: it has no tokenizer.json") from error
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error})") from error
    missing = [name for name in _DESCRIPTION_FIELDS if not isinstance(description, dict) or name not in description]
    if missing:
        raise FormatError(f"{path} lacks the fields {', '.join(missing)}")
    wrong = [name for name in ("name", "fingerprint", "encoder", "quantizer") if not isinstance(description[name], str)]
    if wrong or not isinstance(description["encoder_config"], dict):
        raise FormatError(f"{path}: {', '.join(wrong) or 'encoder_config'} is not of the right type")
    if description.get("format", FORMAT) != FORMAT:
        raise FormatError(f"{path} has format {description['format']}; this version reads format {FORMAT}")
    return description


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read ({error})") from error


def _build_quantizer(kind: str, tensors: dict[str, Tensor], folder: Path) -> Quantizer:
    from speechtok.quantizers.kmeans import KMeans

    match kind:
        case "kmeans":
            return KMeans.from_tensors(tensors)
        case _:
            raise FormatError(f"{folder / 'tokenizer.json'}: unknown quantizer {kind!r}; this version knows 'kmeans'")
