"""An inert reader of pickled k-means models: it parses a pickle and never calls what the pickle names.

The pickle module imports names and calls them, which is how a pickle runs code. Here `pickletools` splits the stream
into opcodes, and each opcode builds plain data or a `Node` that only remembers a name, its arguments and its state. No
class is imported and no object is constructed, so the allow-list below is policy (say early what is not supported)
rather than the only defence. joblib's array bytes, which lie between opcodes, are read when their wrapper is complete.

Work and memory are bounded: every byte kept comes out of the `Source`, whose length is capped, nothing is copied at an
opcode's request, and the number of opcodes is capped.
"""

import math
import pickletools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from speechtok.errors import FormatError
from speechtok.quantizers.bounded import MEND, Source

__all__ = ["FLOATS", "Node", "Symbol", "arrays_in", "as_array", "read_pickle"]

FLOATS = ("f2", "f4", "f8")

MAX_OPCODES = 4_000_000  # a k-means object needs a few hundred; a bisecting tree of 10,000 leaves needs 1.5 million
MAX_MEMO = 1 << 32  # indices above it do not occur, and chosen ones could collide in a dict

# "module name" -> what the name stands for. Spellings differ by version of numpy, Python and sklearn.
_KINDS: dict[str, str] = {
    "numpy ndarray": "class",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",  # protocols 0-2 write bytes as encode(text, "latin1")
    "collections OrderedDict": "dict",
    "joblib.numpy_pickle NumpyArrayWrapper": "wrapper",
    "sklearn.externals.joblib.numpy_pickle NumpyArrayWrapper": "wrapper",
    "sklearn.cluster._kmeans KMeans": "kmeans",
    "sklearn.cluster._kmeans MiniBatchKMeans": "kmeans",
    "sklearn.cluster._kmeans BisectingKMeans": "kmeans",
    "sklearn.cluster._bisect_k_means BisectingKMeans": "kmeans",
    "sklearn.cluster._bisect_k_means _BisectingTree": "class",
    "sklearn.cluster._kmeans _kmeans_single_lloyd": "class",
    "sklearn.cluster._kmeans _kmeans_single_elkan": "class",
    "sklearn.cluster.k_means_ KMeans": "kmeans",
    "sklearn.cluster.k_means_ MiniBatchKMeans": "kmeans",
    "numpy.random __RandomState_ctor": "class",
    "numpy.random._pickle __randomstate_ctor": "class",
    "numpy.random._pickle __bit_generator_ctor": "class",
    "numpy.random._mt19937 MT19937": "class",
}
for _core in ("numpy.core", "numpy._core"):
    _KINDS[f"{_core}.multiarray _reconstruct"] = "reconstruct"
    _KINDS[f"{_core}.multiarray scalar"] = "class"
    _KINDS[f"{_core}.numeric _frombuffer"] = "frombuffer"  # protocol 5
for _module in ("__builtin__", "builtins"):
    _KINDS[f"{_module} object"] = "class"
    _KINDS[f"{_module} bytes"] = "encode"  # protocols 0-2 write b"" as bytes()
for _module in ("copy_reg", "copyreg"):
    _KINDS[f"{_module} _reconstructor"] = "reconstructor"  # protocols 0 and 1 make every object through it


class Symbol:
    """A global that a pickle names: a label, not the thing."""

    __slots__ = ("kind", "name")

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind


class Node:
    """An object that a pickle describes, not made: what would be called, with which arguments and state."""

    __slots__ = ("args", "raw", "state", "symbol")

    def __init__(self, symbol: Symbol, args: tuple[Any, ...]) -> None:
        self.symbol = symbol
        self.args = args
        self.state: Any = None
        self.raw = b""  # the bytes of joblib's array wrapper


def read_pickle(source: Source) -> Any:
    """Parse a pickle, or a joblib file with its arrays in it, into inert values.

    Parameters
    ----------
    source
        The stream, at its start, as `speechtok.quantizers.bounded.open_source` gives it.

    Returns
    -------
    None, bool, int, float, str, bytes, bytearray, tuple, list, dict, Symbol or Node
        The object that the pickle describes.

    Raises
    ------
    FormatError
        A global off the allow-list, an opcode that no k-means file needs, or a malformed or truncated stream.
    """
    try:
        value = _Machine(source).run()
        source.finish()
        return value
    except FormatError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError, OSError) as error:
        reason = str(error)
    except Exception as error:
        # zlib.error and lzma.LZMAError are plain Exceptions of modules that a Python may have been built without.
        if type(error).__module__ not in ("zlib", "_lzma", "lzma"):
            raise
        reason = str(error)
    raise FormatError(
        f"{source.path}: not a readable pickle (byte {source.tell()}: {reason[:200]}); fetch the file again, or {MEND}"
    )


class _Machine:
    """The pickle machine on inert values."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below the open marks
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(self.source)):  # type: ignore[arg-type]
            if count >= MAX_OPCODES:
                raise self.refused(f"more than {MAX_OPCODES} opcodes, which no k-means model needs")
            name = opcode.name
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                self.stack.append(arg)
            elif name in _PUTS:
                self.put(len(self.memo) if arg is None else arg)
            elif name in _GETS:
                self.get(arg)
            elif name in _TUPLES:
                _push(self, tuple(self.take(_TUPLES[name])))
            elif name in ("GLOBAL", "INST"):
                self.stack.append(self.symbol(arg))
                if name == "INST":
                    raise self.refused("the opcode INST")
            elif name in _ACTIONS:
                _ACTIONS[name](self)
            elif name == "STOP":
                return self.stack.pop()
            elif name not in ("PROTO", "FRAME"):  # frames only group reads
                raise self.refused(f"the opcode {name}")
        raise EOFError("the data end before the pickle does")

    def refused(self, what: str) -> FormatError:
        return FormatError(f"{self.source.path}: refused, it holds {what}; {MEND}")

    def take(self, count: int) -> list[Any]:
        """Take `count` values off the stack."""
        if len(self.stack) < count:
            raise ValueError("a value is missing on the stack")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def put(self, index: int) -> None:
        if not 0 <= index < MAX_MEMO:
            raise ValueError("a memo index is out of range")
        self.memo[index] = self.stack[-1]

    def get(self, index: Any) -> None:
        self.stack.append(self.memo[index])

    def symbol(self, key: Any) -> Symbol:
        kind = _KINDS.get(key)
        if kind is None:
            raise self.refused(f"the global {key.replace(' ', '.', 1)[:200]!r}, which is no part of a k-means model")
        return Symbol(key.replace(" ", "."), kind)

    def stack_global(self) -> None:
        module, name = self.take(2)
        if type(module) is not str or type(name) is not str:
            raise ValueError("a global is not named by text")
        self.stack.append(self.symbol(f"{module} {name}"))

    def make(self) -> None:
        """REDUCE and NEWOBJ: where pickle would call, keep what would be called."""
        symbol, args = self.take(2)
        if type(symbol) is not Symbol or type(args) is not tuple:
            raise ValueError("something other than a named global is called")
        if symbol.kind == "reconstructor":
            if not args or type(args[0]) is not Symbol:
                raise ValueError("_reconstructor is called without a class")
            symbol, args = args[0], ()
        if symbol.kind == "dict":
            if args:
                raise ValueError("an OrderedDict is made with arguments")
            self.stack.append({})
            return
        if symbol.kind == "dtype" and (not args or type(args[0]) is not str or not _DTYPE.fullmatch(args[0])):
            # Object and structured types are not needed, and object arrays hold pickles within the pickle.
            raise self.refused(f"an array of type {str(args[0])[:40] if args and type(args[0]) is str else '?'!r}")
        self.stack.append(Node(symbol, args))

    def build(self) -> None:
        node, state = self.take(2)
        if type(node) is not Node or node.state is not None:
            raise ValueError("a state is given to what takes none")
        node.state = state
        if node.symbol.kind == "wrapper":
            self.read_wrapped(node)
        self.stack.append(node)

    def read_wrapped(self, node: Node) -> None:
        """Read the array bytes that joblib writes after its wrapper: a padding length, the padding, the data."""
        if type(node.state) is not dict:
            raise ValueError("an array wrapper has no fields")
        code, _ = _dtype(node.state.get("dtype"))
        if not re.fullmatch(r"[biufc]\d{1,2}", code):
            raise self.refused(f"an array of type {code!r}")
        count = math.prod(_shape(node.state.get("shape")))
        if node.state.get("numpy_array_alignment_bytes") is not None:
            self.source.read(self.source.read(1)[0])
        node.raw = self.source.read(count * int(code[1:]))

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items are added to what is no list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("items are set on what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:  # the hash of deeply nested tuples overflows the C stack
                raise self.refused("a dict with keys that are not text")
            target[key] = value

    def dict_(self) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.update(items)

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ACTIONS: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda m: m.since_mark().clear(),
    "DUP": lambda m: m.stack.append(m.stack[-1]),
    "TUPLE": lambda m: _push(m, tuple(m.since_mark())),
    "LIST": lambda m: _push(m, m.since_mark()),
    "DICT": _Machine.dict_,
    "EMPTY_LIST": lambda m: m.stack.append([]),
    "EMPTY_DICT": lambda m: m.stack.append({}),
    "APPEND": lambda m: m.append(m.take(1)),
    "APPENDS": lambda m: m.append(m.since_mark()),
    "SETITEM": lambda m: m.update(m.take(2)),
    "SETITEMS": lambda m: m.update(m.since_mark()),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.make,
    "NEWOBJ": _Machine.make,
    "BUILD": _Machine.build,
}
_DTYPE = re.compile(r"[<>|=]?(?:[biufcmM]\d{1,2}|[SU]\d{1,9})")


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)  # a function of its own, because since_mark() replaces the stack


def _dtype(node: Any) -> tuple[str, str]:
    """Give the type code (such as "f4") and the byte order ("<", ">", "=" or "|") of a pickled dtype."""
    if type(node) is not Node or node.symbol.kind != "dtype":
        raise ValueError("an array has no type")
    order, code = "=", node.args[0]
    if code[0] in "<>|=":
        order, code = code[0], code[1:]
    if type(node.state) is tuple and len(node.state) > 1 and node.state[1] in ("<", ">", "=", "|"):
        order = node.state[1]
    return code, order


def _shape(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 32 or any(type(n) is not int or not 0 <= n < 1 << 62 for n in value):
        raise ValueError("an array has no valid shape")
    return value


def _bytes(value: Any) -> bytes:
    """Give the array data that a pickle holds as bytes, as Python 2 text, or as encode(text, "latin1")."""
    if type(value) is Node and value.symbol.kind == "encode":
        if not value.args:
            return b""
        value = value.args[0]
    if type(value) is str:
        return value.encode("latin1")
    if type(value) in (bytes, bytearray):
        return bytes(value)
    raise ValueError("the array data are not bytes")


def _parts(node: Node) -> tuple[Any, Any, bool, bytes]:
    """Give dtype, shape, whether the data are in Fortran order, and the data of a pickled array."""
    kind = node.symbol.kind
    if kind == "wrapper" and type(node.state) is dict:
        return node.state.get("dtype"), node.state.get("shape"), node.state.get("order") == "F", node.raw
    if kind == "frombuffer" and len(node.args) == 4:
        data, dtype, shape, order = node.args
        return dtype, shape, order == "F", _bytes(data)
    if kind == "reconstruct" and type(node.state) is tuple and len(node.state) in (4, 5):
        shape, dtype, fortran, data = node.state[-4:]
        return dtype, shape, fortran in (True, 1), _bytes(data)
    raise ValueError(f"{node.symbol.name} is no complete array")


def as_array(value: Any, path: Path, field: str) -> np.ndarray:
    """Make the numpy array that a `Node` describes.

    Parameters
    ----------
    value
        A value out of `read_pickle`.
    path, field
        Named in errors.

    Returns
    -------
    array
        Of float16, float32 or float64, in any byte order, of any shape, read-only.

    Raises
    ------
    FormatError
        It is not an array, not of floats, or its bytes do not fill its shape.
    """
    try:
        if type(value) is not Node:
            raise ValueError(f"it is a {type(value).__name__}, not an array")
        dtype, shape, fortran, data = _parts(value)
        code, order = _dtype(dtype)
        if code not in FLOATS:
            raise ValueError(f"its type is {code!r}, not one of {', '.join(FLOATS)}")
        if math.prod(_shape(shape)) * int(code[1:]) != len(data):
            raise ValueError(f"{len(data)} bytes do not fill its shape")
        flat = np.frombuffer(data, (order if order in "<>" else "=") + code)
        return flat.reshape(shape, order="F" if fortran else "C")
    except ValueError as error:
        raise FormatError(f"{path}: {field} is not a readable array: {error}; {MEND}") from error


def arrays_in(values: dict[str, Any]) -> Iterator[str]:
    """Yield the names in a dict whose value is a pickled array."""
    for name, value in values.items():
        if type(value) is Node and value.symbol.kind in ("wrapper", "frombuffer", "reconstruct"):
            yield name
