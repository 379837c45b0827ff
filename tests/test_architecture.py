"""The shape of the house: which room may use which, and how heavy the front door is."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up; a room may import from its own and lower floors only.
FLOORS = [
    {"errors", "frames", "units", "registry", "windows"},
    {"devices", "kernels"},
    {"nn", "audio"},
    {"metrics"},
    {"encoders", "segmenters", "quantizers", "codecs", "vocoders", "lm"},
    {"bundle", "canonical", "decoding", "frame_units", "segments"},
    {"tokenizer"},
    {"streaming"},
    {"enhancement", "hub"},
    {"corpus"},
    {"evaluation", "training"},
    {"benchmarks"},
    {"cli"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}


def modules():
    for path in sorted((ROOT / "speechtok").rglob("*.py")):
        parts = path.relative_to(ROOT / "speechtok").with_suffix("").parts
        if parts != ("__init__",):
            yield path, parts[0]
    for room in ("cli", "benchmarks"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path, room


def imported_rooms(path: Path):
    """Rooms of speechtok that a module imports, at the top or inside functions; type-checking blocks do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.level and "cli" not in path.parts:
            yield "relative imports are for the command line only"
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("speechtok"):
            parts = node.module.split(".")
            yield from ([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("speechtok."))


def test_every_room_has_a_floor():
    assert {room for _, room in modules()} <= set(FLOOR)


# A tokenizer bundle names its encoder, so Tokenizer.stream and Tokenizer.load reach up or across on purpose.
ALLOWED = {("tokenizer", "streaming")}


def test_imports_run_one_way():
    wrong = [
        f"{path.relative_to(ROOT)} imports speechtok.{used}"
        for path, room in modules()
        for used in imported_rooms(path)
        if FLOOR.get(used, 99 if " " in used else 0) > FLOOR[room] and (room, used) not in ALLOWED
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rule_would_notice(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from speechtok.corpus.engine import tokenize\n")
    assert list(imported_rooms(bad)) == ["corpus"]


def test_modules_stay_small():
    long = {str(path.relative_to(ROOT)): n for path, _ in modules() if (n := len(path.read_text().splitlines())) > 500}
    assert not long


@pytest.mark.parametrize(
    "code", ["import speechtok", "import sys; sys.argv=['speechtok','--help']; from speechtok.cli import main; main()"]
)
def test_front_door_is_light(code):
    """Neither the import nor the help loads torch."""
    tell = "atexit.register(lambda: sys.stderr.write('torch' if 'torch' in sys.modules else 'light'))"
    check = f"import atexit, sys\n{tell}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "light"


def test_lazy_names_resolve():
    import speechtok

    assert speechtok.Units.__name__ == "Units"
    assert speechtok.Stream.__name__ == "Stream"
    assert callable(speechtok.load)
    assert callable(speechtok.encoders.from_pretrained)
    assert "load" in dir(speechtok)
    with pytest.raises(AttributeError, match="no attribute"):
        speechtok.nonsense  # noqa: B018
