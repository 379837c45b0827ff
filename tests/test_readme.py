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
    commands = {command.callback.__name__: command.callback for command in app.registered_commands}
    used = set(re.findall(r"^    (?:.*\| )?speechtok (\w+)", README, re.MULTILINE))
    assert used == set(commands)


def test_the_two_commands_come_first():
    assert re.search(r"\n    make demo\n    make test\n", README[:1200])
