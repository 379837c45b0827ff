"""Centroid files: those that scikit-learn, joblib, numpy, safetensors and torch write, and hostile ones."""

import builtins
import bz2
import contextlib
import functools
import gzip
import io
import lzma
import os
import pickle
import pickletools
import struct
import sys
import time
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechtok.errors import FormatError, InputError, SpeechtokError
from speechtok.quantizers import bounded, unpickle
from speechtok.quantizers.centroids import read_centroids

joblib = pytest.importorskip("joblib")
cluster = pytest.importorskip("sklearn.cluster")

KINDS = ["KMeans", "MiniBatchKMeans", "BisectingKMeans"]
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@functools.cache
def fitted(kind="KMeans", dtype="float32", order="C", seed_object=False):
    """Give a fitted model; its centres have the dtype and memory order asked for."""
    seed = np.random.RandomState(3) if seed_object else 3
    x = np.random.default_rng(0).normal(size=(120, 6)).astype(dtype)
    options = {} if kind == "BisectingKMeans" else {"n_init": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(cluster, kind)(7, random_state=seed, **options).fit(x)
    model.cluster_centers_ = np.array(model.cluster_centers_, dtype=dtype, order=order)
    return model


def check(path, expected):
    result = read_centroids(path)
    assert result.dtype == np.float32 and result.flags.c_contiguous and result.flags.writeable
    np.testing.assert_array_equal(result, np.asarray(expected).astype(np.float32))


def written(tmp_path, data, name="model.bin"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


# Files as they are published


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_pickle(tmp_path, kind, protocol, dtype, order):
    for seed_object in (False, True):
        model = fitted(kind, dtype, order, seed_object)
        check(written(tmp_path, pickle.dumps(model, protocol)), model.cluster_centers_)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", KINDS)
def test_joblib(tmp_path, kind, protocol, dtype, order):
    for seed_object in (False, True):
        model = fitted(kind, dtype, order, seed_object)
        joblib.dump(model, tmp_path / "model.km", protocol=protocol)
        check(tmp_path / "model.km", model.cluster_centers_)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "compress", [0, 1, 3, 9, *((name, level) for name in ("zlib", "gzip", "bz2", "lzma", "xz") for level in (1, 9))]
)
def test_compressed(tmp_path, compress, protocol):
    model = fitted(seed_object=True)
    joblib.dump(model, tmp_path / "model.mdl", compress=compress, protocol=protocol)
    check(tmp_path / "model.mdl", model.cluster_centers_)


@pytest.mark.parametrize("shape", [(1, 1), (2000, 300)])
@pytest.mark.parametrize("compress", [0, ("zlib", 1), ("gzip", 1), ("bz2", 1), ("xz", 1)])
def test_sizes(tmp_path, shape, compress):
    values = np.random.default_rng(1).normal(size=shape).astype("float32")
    for name, array in (("random", values), ("constant", np.full_like(values, 0.5)), ("swapped", values.astype(">f4"))):
        joblib.dump(array, tmp_path / name, compress=compress)
        check(tmp_path / name, array)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f2", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bare_arrays(tmp_path, dtype, order, protocol):
    array = np.array(np.arange(12).reshape(3, 4) / 8, dtype=dtype, order=order)
    check(written(tmp_path, pickle.dumps(array, protocol)), array)
    check(written(tmp_path, pickle.dumps(array[::2, ::3], protocol)), array[::2, ::3])
    check(written(tmp_path, pickle.dumps({"x": 1, "y": "z", "c": array}, protocol)), array)
    check(written(tmp_path, pickle.dumps({"other": array[:1], "centroids": array}, protocol)), array)
    joblib.dump({"mean": array[0], "cluster_centers_": array}, tmp_path / "d.joblib", protocol=protocol)
    check(tmp_path / "d.joblib", array)
    np.save(tmp_path / "a.npy", array)
    check(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", array)
    check(tmp_path / "a.npz", array)
    np.savez_compressed(tmp_path / "b.npz", mean=array[0], cluster_centers_=array)
    check(tmp_path / "b.npz", array)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_old_names(tmp_path, protocol):
    """scikit-learn up to 0.21 and numpy 1 used other module names."""
    model = fitted("MiniBatchKMeans", seed_object=True)
    names = {"sklearn.cluster._kmeans": "sklearn.cluster.k_means_", "numpy._core.multiarray": "numpy.core.multiarray"}
    names["numpy._core.numeric"] = "numpy.core.numeric"
    check(written(tmp_path, renamed(pickle.dumps(model, protocol), names)), model.cluster_centers_)


def renamed(data, names):
    """Replace module names in a pickle, unframed so that lengths may change."""
    out, end = [], len(data)
    ops = list(pickletools.genops(data))
    for i, (op, arg, pos) in enumerate(ops):
        stop = ops[i + 1][2] if i + 1 < len(ops) else end
        chunk = data[pos:stop]
        if op.name == "FRAME":
            continue
        if op.name == "GLOBAL" and arg.split(" ")[0] in names:
            module, name = arg.split(" ")
            chunk = f"c{names[module]}\n{name}\n".encode()
        elif op.name == "SHORT_BINUNICODE" and arg in names:
            text = names[arg].encode()
            chunk = b"\x8c" + bytes([len(text)]) + text
        out.append(chunk)
    return b"".join(out)


def test_joblib_of_scikit_learn_0_20(tmp_path):
    """The joblib inside old scikit-learn: another module name, and no padding before array bytes."""
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    body = (
        b"\x80\x03csklearn.cluster.k_means_\nMiniBatchKMeans\n)\x81}X\x10\x00\x00\x00cluster_centers_"
        b"csklearn.externals.joblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}("
        b"X\x08\x00\x00\x00subclasscnumpy\nndarray\nX\x05\x00\x00\x00shapeK\x02K\x03\x86X\x05\x00\x00\x00orderX\x01\x00\x00\x00C"
        b"X\x05\x00\x00\x00dtypecnumpy\ndtype\nX\x02\x00\x00\x00f4K\x00K\x01\x87R(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tbX\x0a\x00\x00\x00allow_mmap\x88ub" + array.tobytes() + b"sb."
    )
    check(written(tmp_path, body), array)


def test_python_2_bytes(tmp_path):
    """Python 2 wrote array bytes as a byte string, protocol 2."""
    array = np.array([[1.5, -2.25]], dtype="<f8")
    body = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01K\x02\x86"
        b"cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x10"
    )
    check(written(tmp_path, body + array.tobytes() + b"tb."), array)


def test_safetensors_and_torch(tmp_path):
    import torch
    from safetensors.numpy import save_file

    array = np.random.default_rng(2).normal(size=(5, 3))
    for dtype in ("float16", "float32", "float64"):
        save_file({"weights": array.astype(dtype)}, tmp_path / "a.safetensors")
        check(tmp_path / "a.safetensors", array.astype(dtype))
        torch.save(torch.from_numpy(array.astype(dtype)), tmp_path / "a.pt")
        check(tmp_path / "a.pt", array.astype(dtype))
    save_file({"mean": array[0], "centroids": array}, tmp_path / "named.bin")
    check(tmp_path / "named.bin", array)
    torch.save({"epoch": 3, "centroids": torch.from_numpy(array).bfloat16().T.contiguous().T}, tmp_path / "b.pt")
    check(tmp_path / "b.pt", torch.from_numpy(array).bfloat16().float().numpy())
    torch.save(torch.nn.Parameter(torch.from_numpy(array)), tmp_path / "c.pt")
    check(tmp_path / "c.pt", array)


# Files that are refused for what they hold


def refuse(path, *words):
    with pytest.raises(FormatError) as caught:
        read_centroids(path)
    message = str(caught.value)
    assert str(path) in message and len(message) < 1200
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros(3, "f4"), "shape [3]"),
        (np.zeros((2, 3, 4), "f4"), "shape [2, 3, 4]"),
        (np.zeros((0, 4), "f4"), "shape [0, 4]"),
        (np.zeros((4, 0), "f4"), "shape [4, 0]"),
        (np.array(1, "f4"), "shape []"),
        (np.zeros((2, 3), "i4"), "'i4'"),
        (np.zeros((2, 3), "c8"), "'c8'"),
        (np.zeros((2, 3), "S4"), "'S4'"),
        (np.zeros((2, 3), "?"), "'b1'"),
        (np.array([[1, np.nan], [0, 0]], "f4"), "row 0"),
        (np.array([[1, 0], [0, -np.inf]], "f4"), "row 1"),
        (np.array([[1, 0], [0, 1e39]], "f8"), "not finite in float32"),
        (np.array([[1, "a"]], object), ""),
        (np.zeros((2,), [("a", "f4")]), ""),
    ],
)
def test_bad_arrays(tmp_path, array, word):
    for protocol in PROTOCOLS:
        refuse(written(tmp_path, pickle.dumps(array, protocol)), word)
    joblib.dump(array, tmp_path / "a.km")
    refuse(tmp_path / "a.km")
    np.save(tmp_path / "a.npy", array)
    refuse(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", array)
    refuse(tmp_path / "a.npz")


def test_bad_fields(tmp_path):
    import torch
    from safetensors.numpy import save_file
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    array = np.ones((2, 3), "f4")
    np.savez(tmp_path / "two.npz", a=array, b=array)
    refuse(tmp_path / "two.npz", "holds 2", "'a'", "centroids")
    np.savez(tmp_path / "both.npz", centroids=array, cluster_centers_=array)
    refuse(tmp_path / "both.npz", "holds 2")
    np.savez(tmp_path / "none.npz")
    refuse(written(tmp_path, b"PK\x03\x04"), "zip")
    save_file({"a": array, "b": array}, tmp_path / "two.safetensors")
    refuse(tmp_path / "two.safetensors", "holds 2")
    save_file({"a": array.astype("i8")}, tmp_path / "int.safetensors")
    refuse(tmp_path / "int.safetensors", "I64", "float32")
    refuse(written(tmp_path, b"", "empty.km"), "empty")
    refuse(written(tmp_path, pickle.dumps({"a": 1})), "none")
    for value in (None, 3, "text", [array], (array,), b"x", {"a": array, "b": array}, np.float32(3), np.dtype("f4")):
        refuse(written(tmp_path, pickle.dumps(value)))
    refuse(written(tmp_path, pickle.dumps(cluster.KMeans(3))), "cluster_centers_", "fit")
    refuse(written(tmp_path, pickle.dumps(make_pipeline(StandardScaler(), fitted()))), "sklearn.pipeline.Pipeline")
    refuse(written(tmp_path, pickle.dumps(cluster.Birch())), "sklearn.cluster._birch.Birch", "numpy.save")
    for name, value in {
        "list": [torch.ones(2, 3)],
        "ints": torch.ones(2, 3, dtype=torch.int32),
        "flat": torch.ones(3),
        "sparse": torch.eye(3).to_sparse(),
        "view": torch.ones(1).expand(1 << 40).reshape(1 << 20, 1 << 20),
        "meta": torch.ones(2, 3, device="meta"),
        "two": {"a": torch.ones(2, 3), "b": torch.ones(2, 3)},
    }.items():
        torch.save(value, tmp_path / f"{name}.pt")
        refuse(tmp_path / f"{name}.pt")
    torch.save(torch.ones(2, 3), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refuse(tmp_path / "old.pt", "torch")


def test_missing(tmp_path):
    for path in (tmp_path / "no.km", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            read_centroids(path)


@pytest.mark.parametrize(("head", "word"), [(b"\x04\x22\x4d\x18rest", "lz4"), (b"ZF0x20", "joblib before 0.10")])
def test_unsupported_compression(tmp_path, head, word):
    refuse(written(tmp_path, head), word)


# Files that attack


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def chain(module, name, *args):
    """Assemble a protocol 4 pickle that calls what a dotted STACK_GLOBAL names."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + b"".join(map(text, args)) + b"tR."


OBJECT_DTYPE = (
    b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01tR(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb"
)


def attacks(canary):
    touch = f"touch {canary}"
    create = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    evil = Call(os.system, touch)
    model = fitted()
    inside = pickle.loads(pickle.dumps(model))
    inside.verbose = evil
    array = np.empty((1, 2), object)
    array[:] = [[evil, 1.0]]
    inner = pickle.dumps(evil)
    yield "system", pickle.dumps(evil)
    for protocol in PROTOCOLS:
        yield f"system in a model, protocol {protocol}", pickle.dumps(inside, protocol)
        yield f"object array, protocol {protocol}", pickle.dumps(array, protocol)
        yield f"eval, protocol {protocol}", pickle.dumps(Call(builtins.eval, create), protocol)
    buffer = io.BytesIO()
    joblib.dump(array, buffer)
    yield "object array in joblib's wrapper", buffer.getvalue()
    buffer = io.BytesIO()
    joblib.dump(inside, buffer)
    yield "system in a joblib file", buffer.getvalue()
    yield "compressed", zlib.compress(pickle.dumps(evil))
    yield "exec", pickle.dumps(Call(builtins.exec, create))
    chained = b"cbuiltins\ngetattr\n(cos\npath\n" + text("os") + b"tR"
    yield "getattr chain", b"\x80\x04cbuiltins\ngetattr\n(" + chained + text("system") + b"tR(" + text(touch) + b"tR."
    yield "inst", b"(S'" + touch.encode() + b"'\nios\nsystem\n."
    yield "obj", b"(cos\nsystem\nS'" + touch.encode() + b"'\no."
    yield "global with a path", b"cnumpy\ncore.os.system\n(S'" + touch.encode() + b"'\ntR."
    yield "newobj of a function", b"\x80\x02cos\nsystem\nU" + bytes([len(touch)]) + touch.encode() + b"\x85\x81."
    yield "newobj_ex", b"\x80\x04" + text("os") + text("system") + b"\x93" + text(touch) + b"\x85}\x92."
    for module, name in [
        ("numpy", "core.os.system"),
        ("numpy", "_core.multiarray.os.system"),
        ("numpy", "ndarray.__class__"),
        ("numpy", "dtype.__reduce__"),
        ("numpy", "lib._npyio_impl.os.system"),
        ("numpy.core.multiarray", "_reconstruct.__globals__"),
        ("numpy dtype", ""),
        ("", "numpy dtype"),
        ("numpy.core.multiarray", "scalar.__self__"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy", "f2py.os.system"),
        ("numpy", "load"),
        ("numpy", "memmap"),
        ("numpy", "fromfile"),
        ("joblib", "load"),
        ("joblib.numpy_pickle", "load"),
        ("joblib.numpy_pickle", "NDArrayWrapper"),
        ("joblib.numpy_pickle", "NumpyArrayWrapper.read"),
        ("sklearn.externals.joblib", "load"),
        ("sklearn.externals", "joblib.load"),
        ("sklearn.cluster._kmeans", "os.system"),
        ("sklearn.cluster._kmeans", "KMeans.fit"),
        ("sklearn.utils", "os.system"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "namedtuple"),
        ("_codecs", "decode"),
        ("_codecs", "lookup"),
        ("copyreg", "add_extension"),
        ("copyreg", "__newobj__"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("torch", "load"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("pickle", "loads"),
        ("builtins", "__import__"),
        ("builtins", "type"),
    ]:
        yield f"{module}.{name}", chain(module, name, touch)
    for where in ("multiarray\nscalar", "multiarray\n_reconstruct"):
        data = OBJECT_DTYPE + b"B" + struct.pack("<I", len(inner)) + inner
        yield f"object dtype in {where!r}", b"\x80\x03cnumpy.core." + where.encode() + b"\n(" + data + b"tR."
    yield "object dtype in frombuffer", (
        b"\x80\x05cnumpy.core.numeric\n_frombuffer\n(\x96" + struct.pack("<Q", len(inner)) + inner + OBJECT_DTYPE
        + b"K\x01\x85" + text("C") + b"tR."
    )  # fmt: skip
    yield "object dtype in the wrapper", (
        b"\x80\x04cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}(" + text("shape") + b"K\x01\x85" + text("order")
        + text("C") + text("dtype") + OBJECT_DTYPE + text("subclass") + b"cnumpy\nndarray\nub" + inner + b"."
    )  # fmt: skip
    yield "subclass in the wrapper", (
        b"\x80\x04cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}(" + text("subclass") + b"cos\nsystem\nub."
    )  # fmt: skip
    yield "structured dtype of objects", pickle.dumps(np.dtype([("a", "O")]))
    yield "call of a node", b"\x80\x04cnumpy\ndtype\n(" + text("f4") + b"tR(" + text(touch) + b"tR."
    yield "call of text", b"\x80\x04" + text("os.system") + b"(" + text(touch) + b"tR."
    yield "setstate on a class", b"\x80\x04csklearn.cluster._kmeans\nKMeans\n}" + text("fit") + text(touch) + b"sb0."
    yield "setstate on a dict", b"\x80\x04}}" + text("__class__") + text(touch) + b"sb."
    yield "setstate with slots", pickle.dumps(Call(cluster.KMeans, state=(None, {"__class__": 1})))
    yield "setstate twice", b"\x80\x04csklearn.cluster._kmeans\nKMeans\n)\x81}b}b."
    yield "items on a class", b"\x80\x04csklearn.cluster._kmeans\nKMeans\n" + text("__reduce__") + text(touch) + b"s."
    yield "append to an object", b"\x80\x04csklearn.cluster._kmeans\nKMeans\n)\x81" + text(touch) + b"a."
    yield "persistent id", b"Pevil\n."
    yield "binary persistent id", b"\x80\x04" + text(touch) + b"Q."
    yield "extension 1", b"\x80\x02\x82\x01."
    yield "extension 2", b"\x80\x02\x83\x01\x00."
    yield "extension 4", b"\x80\x02\x84\x01\x00\x00\x00."
    yield "next buffer", b"\x80\x05\x97."
    yield "read-only buffer", b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00a\x98."


def test_attacks(tmp_path):
    canary = tmp_path / "canary"
    seen = 0
    for name, data in attacks(canary):
        for ending in (".bin", ".npy", ".pt"):
            path = written(tmp_path, data, "attack" + ending)
            with pytest.raises(FormatError) as caught:
                read_centroids(path)
            assert str(path) in str(caught.value), name
            assert not canary.exists(), name
        seen += 1
    assert seen > 80


def test_attacks_are_live(tmp_path):
    """The control: the standard readers run what `attacks` yields, so the canary is able to sing."""
    canary = tmp_path / "canary"
    live = dict(attacks(canary))
    calls = ["system", "inst", "obj", "getattr chain"]
    for name in [*calls, "system in a model, protocol 2", "object array, protocol 4", "eval, protocol 0"]:
        with warnings.catch_warnings(), contextlib.suppress(Exception):  # some fail after the call
            warnings.simplefilter("ignore")
            ARMED.append(True)
            try:
                pickle.loads(live[name])
            finally:
                ARMED.clear()
        assert canary.exists() and ALARMS, name
        ALARMS.clear()
        canary.unlink()
    joblib.load(written(tmp_path, live["object array in joblib's wrapper"]))
    assert canary.exists()


def test_global_is_named(tmp_path):
    refuse(written(tmp_path, pickle.dumps(Call(os.system, "true"))), "posix.system", "numpy.save")
    refuse(written(tmp_path, chain("numpy", "core.os.system", "true")), "numpy.core.os.system")
    refuse(written(tmp_path, b"(S'true'\nios\nsystem\n."), "os.system")
    refuse(written(tmp_path, b"\x80\x04" + text("x" * 250) + text("y" * 250) + b"\x93."), "xxx")


def test_attack_in_torch_and_npz(tmp_path):
    import torch

    canary = tmp_path / "canary"
    evil = Call(os.system, f"touch {canary}")
    torch.save({"centroids": evil}, tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", centroids=np.array([[evil]], object))
    np.save(tmp_path / "a.npy", np.array([[evil]], object))
    for name in ("a.pt", "a.npz", "a.npy"):
        refuse(tmp_path / name)
        assert not canary.exists()


# Files that exhaust


def peak(path):
    tracemalloc.start()
    try:
        started = time.monotonic()
        refuse(path)
        return tracemalloc.get_traced_memory()[1], time.monotonic() - started
    finally:
        tracemalloc.stop()


def claim(shape):
    """Pickle an array that claims a shape and has no data."""
    numbers = b"".join(b"\x8a\x09" + n.to_bytes(9, "little") for n in shape)
    dtype = b"cnumpy\ndtype\n(" + text("f4") + b"K\x00K\x01tR"
    head = b"\x80\x04cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81}(" + text("order") + text("C")
    return head + text("dtype") + dtype + text("shape") + b"(" + numbers + b"tub."


@pytest.mark.parametrize("shape", [(1 << 40, 1 << 20), (1 << 62, 1 << 62), (1 << 30,), (1 << 33, 0), (0, 1 << 61)])
def test_huge_shapes(tmp_path, shape):
    for data in (claim(shape), zlib.compress(claim(shape)), lzma.compress(claim(shape), preset=0)):
        assert peak(written(tmp_path, data))[0] < 4 << 20
    refuse(written(tmp_path, claim(shape)), *(["asked for"] if shape[-1] and shape[0] and max(shape) < 1 << 62 else []))
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (118 - len(header) % 64) + b"\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    assert peak(written(tmp_path, npy, "a.npy"))[0] < 4 << 20
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", npy)
    assert peak(tmp_path / "a.npz")[0] < 4 << 20


@pytest.mark.parametrize("opcode", [b"B", b"X", b"T", b"\x8e", b"\x8d", b"\x96", b"\x8b", b"\x95"])
def test_huge_lengths(tmp_path, opcode):
    for length in (b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff"):
        size = length + (length if opcode in b"\x8e\x8d\x96\x95" else b"")
        for data in (b"\x80\x05" + opcode + size + b"abc.", gzip.compress(b"\x80\x05" + opcode + size + b"abc.")):
            assert peak(written(tmp_path, data))[0] < 4 << 20


@pytest.mark.parametrize("compress", [zlib.compress, gzip.compress, bz2.compress, lzma.compress])
def test_bombs(tmp_path, compress, monkeypatch):
    monkeypatch.setattr(bounded, "ALWAYS_ALLOWED", 1 << 20)
    monkeypatch.setattr(bounded, "MAX_EXPANDED", 8 << 20)
    for body in (b"\x80\x04B\xff\xff\xff\x7f", b"\x80\x04V", b"c"):
        data = compress(body + bytes(64 << 20))
        memory, _ = peak(written(tmp_path, data))
        assert memory < 80 << 20  # the bound and the copies of it, not the 64 MiB of the content several times
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(64 << 20))
    assert peak(tmp_path / "a.npz")[0] < 4 << 20


@pytest.mark.parametrize("opcodes", [b"]", b"}", b"(", b"N", b"0", b"]\x94", b")\x85", b"K\x01\x85", b"N2", b"(l"])
def test_many_opcodes(tmp_path, opcodes, monkeypatch):
    monkeypatch.setattr(unpickle, "MAX_OPCODES", 100_000)
    memory, seconds = peak(written(tmp_path, gzip.compress(b"\x80\x04N" + opcodes * 5_000_000 + b".")))
    assert memory < 64 << 20 and seconds < 20


def test_xz_dictionary(tmp_path):
    head = b"\xfd7zXZ\x00\x00\x04\xe6\xd6\xb4F\x02\x00!\x01\x22\x00\x00\x00"  # asks for 1 GiB
    body = head + struct.pack("<I", zlib.crc32(head[12:])) + b"\x01\x00\x00a\x00"
    with pytest.raises(lzma.LZMAError, match="[Mm]emory"):
        lzma.LZMADecompressor(memlimit=1 << 28).decompress(body)
    assert peak(written(tmp_path, body))[0] < 8 << 20


def test_deep_nesting(tmp_path):
    """Nothing walks into nested values: no hash, no comparison, no text of them."""
    deep = b"\x80\x04)" + b"\x85" * 1_000_000
    refuse(written(tmp_path, deep + b"."), "tuple")
    refuse(written(tmp_path, b"\x80\x04}" + deep[2:] + b"Ns."), "not text")
    refuse(written(tmp_path, b"\x80\x04)" + b"2\x86" * 500_000 + b"."), "tuple")  # 2 ** 500000 leaves
    refuse(written(tmp_path, b"\x80\x04" + b"]" * 500_000 + b"a" * 499_999 + b"."), "list")
    refuse(written(tmp_path, b"\x80\x04]\x94h\x00a."), "list")
    state = b"csklearn.cluster._kmeans\nKMeans\n)\x81"
    refuse(written(tmp_path, b"\x80\x04" + state * 50_000 + b"b" * 49_999 + b"."), "cluster_centers_")


def test_truncated(tmp_path):
    model = fitted("MiniBatchKMeans", seed_object=True)
    files = {"a.bin": pickle.dumps(model), "b.bin": pickle.dumps(model, 0)}
    for name, compress in (("c.bin", 0), ("d.bin", 3), ("e.bin", ("xz", 3)), ("f.bin", ("bz2", 3))):
        joblib.dump(model, tmp_path / name, compress=compress)
        files[name] = (tmp_path / name).read_bytes()
    np.savez_compressed(tmp_path / "g.npz", model.cluster_centers_)
    np.save(tmp_path / "h.npy", model.cluster_centers_)
    for name in ("g.npz", "h.npy"):
        files[name] = (tmp_path / name).read_bytes()
    for name, data in files.items():
        for end in [*range(40), *range(40, len(data), max(1, len(data) // 80)), len(data) - 1]:
            path = written(tmp_path, data[:end], name)
            with pytest.raises(FormatError):
                read_centroids(path)


# Anything at all


def seeds():
    model = fitted("MiniBatchKMeans", seed_object=True)
    small = cluster.KMeans(2, n_init=1, random_state=0).fit(np.eye(4, dtype="f4"))
    for protocol in PROTOCOLS:
        yield pickle.dumps(small, protocol)
        yield pickle.dumps(small.cluster_centers_, protocol)
        buffer = io.BytesIO()
        joblib.dump(small, buffer, protocol=protocol)
        yield buffer.getvalue()
    yield pickle.dumps(model)
    for compress in (3, ("gzip", 3), ("bz2", 3), ("xz", 3), ("lzma", 3)):
        buffer = io.BytesIO()
        joblib.dump(small, buffer, compress=compress)
        yield buffer.getvalue()
    for save in (np.save, np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, small.cluster_centers_)
        yield buffer.getvalue()
    from safetensors.numpy import save

    yield save({"centroids": small.cluster_centers_})
    import torch

    buffer = io.BytesIO()
    torch.save({"centroids": torch.from_numpy(small.cluster_centers_)}, buffer)
    yield buffer.getvalue()


SEEDS = list(seeds())
CANARY_CALL = b"cos\nsystem\n(S'touch speechtok_canary'\ntR"
SPLICES = st.one_of(
    st.binary(max_size=8),
    st.sampled_from(
        [CANARY_CALL, CANARY_CALL + b"0", OBJECT_DTYPE, b"\x81", *(bytes([b]) for b in b"Rb02(tuse.")],
    ),
)


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    """A folder that is also the current one, where a canary would appear."""
    folder = tmp_path_factory.mktemp("fuzz")
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


WATCHED = ("pickle.find_class", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "exec")
ALARMS: list[str] = []
ARMED: list[bool] = []


def watch(event, args):
    """Note what the interpreter reports (PEP 578) while a file is read; a hook cannot be taken off again."""
    if ARMED and event.startswith(WATCHED):
        if event == "exec" and os.path.exists(args[0].co_filename):
            return  # the first use of a codec or of torch imports modules
        ALARMS.append(f"{event} {args!r}"[:200])


@pytest.fixture(scope="module", autouse=True)
def watching():
    sys.addaudithook(watch)


def survives(arena, data):
    path = arena / "fuzz.bin"
    path.write_bytes(data)
    ALARMS.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ARMED.append(True)
            try:
                result = read_centroids(path)
            finally:
                ARMED.clear()
        except SpeechtokError as error:
            assert isinstance(error, FormatError) and str(path) in str(error)
        else:
            assert result.dtype == np.float32 and result.ndim == 2 and np.isfinite(result).all()
    assert not ALARMS and os.listdir(arena) == ["fuzz.bin"]


FUZZ = settings(
    max_examples=int(os.environ.get("SPEECHTOK_FUZZ", "500")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), SPLICES), min_size=1, max_size=5),
    cut=st.floats(0.5, 1.3),
)
def test_mutated(arena, seed, edits, cut):
    data = bytearray(seed)
    for where, length, new in edits:
        at = int(where * len(data))
        data[at : at + length] = new
    survives(arena, bytes(data[: int(cut * len(data))]))


@FUZZ
@given(
    data=st.binary(max_size=300),
    head=st.sampled_from(
        [b"", b"\x80\x04", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\x78\x9c", b"\xfd7zXZ\x00", b"BZh9"]
    ),
)
def test_random_bytes(arena, data, head):
    survives(arena, head + data)


PIECES = [bytes([b]) for b in b"().0126789NabdelostuRT]}\x81\x85\x86\x87\x88\x8f\x90\x91\x93\x94"]
PIECES += [text("f4"), text("numpy"), text("dtype"), b"K\x00", b"K\x02", b"h\x00", CANARY_CALL, claim((1, 1))[2:-1]]
PIECES += [
    f"c{module}\n{name}\n".encode()
    for module, name in [
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
        ("copy_reg", "_reconstructor"),
        ("_codecs", "encode"),
        ("collections", "OrderedDict"),
        ("sklearn.cluster._kmeans", "KMeans"),
    ]
]


@FUZZ
@given(st.lists(st.sampled_from(PIECES), max_size=60))
def test_random_opcodes(arena, opcodes):
    survives(arena, b"\x80\x04" + b"".join(opcodes) + b".")
