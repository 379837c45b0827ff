"""The README's Python runs, and its commands exist."""

import re
from pathlib import Path

import numpy as np
from speechtok.cli import app

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_python_snippets_run(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {"chunks": [np.zeros(4800, np.float32)] * 3})


def test_commands_and_options_exist():
    commands = {command.callback.__name__ for command in app.registered_commands}
    groups = {
        f"{group.name or group.typer_instance.info.name} {command.name or command.callback.__name__}"
        for group in app.registered_groups
        for command in group.typer_instance.registered_commands
    }
    lines = re.findall(r"^    (?:.*\| )?speechtok ([\w-]+)(?: ([\w-]+))?", README, re.MULTILINE)
    names = {name.split()[0] for name in groups}
    used = {f"{first} {second}" if first in names else first for first, second in lines}
    # The models are made by `make models`.
    assert used == commands | groups - {"train models"}


def test_no_placeholder_is_left():
    assert "@@" not in README


def test_the_default_is_stated_once():
    """The command line has its own copy only to stay light."""
    from speechtok.cli.common import DEFAULT_TOKENIZER

    from speechtok.registry import DEFAULT

    assert DEFAULT_TOKENIZER == DEFAULT
    assert f'speechtok.load("{DEFAULT}")' in README


def test_the_two_commands_come_first():
    assert re.search(r"\n    make demo\n    make test\n", README[:1200])
