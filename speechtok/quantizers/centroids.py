"""Read k-means centroids as they are published: numpy, safetensors, torch, and pickled scikit-learn models.

The content of the file decides which reader is used, since `.bin`, `.km`, `.mdl` and `.pt` name no format. A pickle is
parsed by `speechtok.quantizers.unpickle`, which calls nothing that the pickle names; there is no switch to trust one.
"""

import io
import math
import os
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from speechtok.errors import FormatError, InputError
from speechtok.quantizers.bounded import expansion_limit, open_source
from speechtok.quantizers.unpickle import FLOATS, Node, arrays_in, as_array, read_pickle

__all__ = ["read_centroids"]

NAMES = ("centroids", "cluster_centers_")
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in a torch file from before its zip format

_MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    SyntaxError,
    EOFError,
    OSError,
    MemoryError,
    RecursionError,
    NotImplementedError,
    RuntimeError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_centroids(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the centroids of a published k-means model.

    Parameters
    ----------
    path
        A file of numpy (`.npy`; `.npz` with one array, or one named "centroids" or "cluster_centers_"), safetensors or
        torch (the same rule), or a scikit-learn KMeans, MiniBatchKMeans or BisectingKMeans that was written by pickle
        or joblib (plain, zlib, gzip, bz2, xz or lzma; not lz4). The content counts, not the extension.

    Returns
    -------
    centroids : float32 [K, D]
        One row per unit, in feature units, C-contiguous, writeable. Stored float16 and float64 are converted.

    Raises
    ------
    InputError
        There is no such file, or it cannot be opened.
    FormatError
        The file is none of these, is damaged, names anything that is no part of a k-means model, or does not hold a
        finite, non-empty matrix of floats. Nothing that the file names is called in any case.

    See Also
    --------
    speechtok.quantizers.unpickle : how pickles are read without running them.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file; give the path of a file of centroids")
        with path.open("rb") as file:
            array, field = _read(file, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); check that the file is whole and readable") from error
    return _checked(array, path, field)


def _read(file: BinaryIO, path: Path) -> tuple[np.ndarray, str]:
    """Choose the reader by content; give the array as stored and the name of its field."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(16)
    file.seek(0)
    if not head:
        raise FormatError(f"{path}: the file is empty; fetch it again")
    if head.startswith(b"\x93NUMPY"):
        return _npy(file, size, path, "the array"), "the array"
    if head.startswith(b"PK\x03\x04"):
        return _zip(file, size, path)
    length = int.from_bytes(head[:8], "little")
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and length <= size - 8):
        return _safetensors(path)
    return _pickle(file, size, path)


def _npy(file: Any, size: int, path: Path, field: str) -> np.ndarray:
    """Read a `.npy` stream of `size` bytes; the header is checked before anything is allocated."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format is for structured arrays")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
        if dtype.str[1:] not in FLOATS:
            raise ValueError(f"its type is {dtype.str[:20]!r}, not one of {', '.join(FLOATS)}")
        count = math.prod(shape)  # in Python integers, which do not wrap
        if any(n < 0 for n in shape) or count * dtype.itemsize > size:
            raise ValueError(f"the file of {size} bytes is too short for its shape")
        data = file.read(count * dtype.itemsize)
        return np.frombuffer(data, dtype, count).reshape(shape, order="F" if fortran else "C")
    except _MALFORMED as error:
        raise FormatError(
            f"{path}: {field} is not a readable array of floats ({error}); fetch the file again, or write it with "
            "numpy.save(path, centroids.astype('float32'))"
        ) from error


def _zip(file: BinaryIO, size: int, path: Path) -> tuple[np.ndarray, str]:
    """Read an `.npz` or a torch file."""
    limit = expansion_limit(size)
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            total = sum(info.file_size for info in archive.infolist())
            if total > limit:
                raise FormatError(
                    f"{path}: its {size} bytes expand to {total}, more than the {limit} allowed; write it uncompressed"
                )
            if not any(name.rpartition("/")[2] == "data.pkl" for name in members):
                arrays = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
                field = _pick(arrays, path)
                info = members[f"{field}.npy"]
                with archive.open(info) as member:
                    # In memory, so that the checksum of the whole member is tested before its header is believed.
                    return _npy(io.BytesIO(member.read()), info.file_size, path, field), field
    except _MALFORMED as error:
        raise FormatError(f"{path}: not a readable zip file ({error}); fetch the file again") from error
    return _torch(path, limit)


def _torch(path: Path, limit: int) -> tuple[np.ndarray, str]:
    import torch

    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on hostile files torch raises errors of any class
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(
            f"{path}: torch reads no plain weights from it ({text}); save only the tensor, "
            'with torch.save({"centroids": centroids}, path)'
        ) from error
    field = "the tensor"
    if isinstance(value, dict):
        field = _pick([k for k, v in value.items() if isinstance(k, str) and isinstance(v, torch.Tensor)], path)
        value = value[field]
    if not isinstance(value, torch.Tensor):
        raise FormatError(f"{path}: it holds a {type(value).__name__}, not a tensor or a dict of tensors")
    if value.layout != torch.strided or value.device.type != "cpu" or not value.dtype.is_floating_point:
        raise FormatError(f"{path}: {field} is no dense tensor of floats; save centroids.float().contiguous()")
    if value.numel() * value.element_size() > limit:  # an expanded view is larger than its storage
        raise FormatError(f"{path}: {field} is larger than its file; save centroids.contiguous()")
    return value.detach().double().numpy(), field


def _safetensors(path: Path) -> tuple[np.ndarray, str]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as tensors:
            field = _pick(list(tensors.keys()), path)
            kind = tensors.get_slice(field).get_dtype()
            if kind not in ("F16", "F32", "F64"):
                raise FormatError(f"{path}: {field} is of type {kind}; save it as float32")
            return tensors.get_tensor(field), field
    except (safetensors.SafetensorError, *_MALFORMED) as error:
        raise FormatError(f"{path}: not a readable safetensors file ({error}); fetch the file again") from error


def _pickle(file: BinaryIO, size: int, path: Path) -> tuple[np.ndarray, str]:
    value = read_pickle(open_source(file, size, path))
    field = "the array"
    if type(value) is Node and value.symbol.kind == "kmeans":
        if type(value.state) is not dict or "cluster_centers_" not in value.state:
            raise FormatError(f"{path}: {value.symbol.name} has no cluster_centers_; fit the model before it is saved")
        field = "cluster_centers_"
        value = value.state[field]
    elif type(value) is dict:
        field = _pick(list(arrays_in(value)), path)
        value = value[field]
    elif type(value) is int and value == TORCH_MAGIC:
        raise FormatError(f"{path}: a torch file of the format before 1.6; load it and torch.save it again")
    return as_array(value, path, field), field


def _pick(names: list[str], path: Path) -> str:
    """Choose the array among `names`: the one with a known name, or the only one."""
    chosen = [name for name in names if name in NAMES] or names
    if len(chosen) != 1:
        listed = ", ".join(repr(name[:80]) for name in names[:10]) or "none"
        raise FormatError(
            f"{path}: it must hold one array, or one named {' or '.join(NAMES)}; it holds {len(names)} ({listed})"
        )
    return chosen[0]


def _checked(array: np.ndarray, path: Path, field: str) -> np.ndarray:
    if array.ndim != 2 or 0 in array.shape:
        raise FormatError(
            f"{path}: {field} has the shape {list(array.shape)}; a matrix of K >= 1 units by D >= 1 values is needed"
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is reported below
        centroids = np.array(array, dtype=np.float32, order="C")
    if not np.isfinite(centroids).all():
        row = int(np.flatnonzero(~np.isfinite(centroids).all(axis=1))[0])
        raise FormatError(
            f"{path}: {field} has values in row {row} that are not finite in float32; train the centroids again "
            "without empty or overflowing clusters"
        )
    return centroids
