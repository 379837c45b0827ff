"""The ``speechtok`` command: each subcommand is a thin shell over one function of the library.

Exit status: 0 all good, 1 user or data error, 2 usage, 3 finished but some files failed.
"""

import signal
import sys
from types import FrameType

import typer

from .convert import convert
from .evaluate import evaluate
from .fit import fit
from .models import models
from .show import show
from .stream import stream
from .synth import synth
from .tokenize import tokenize
from .train import train
from .verify import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="speechtok",
    help="Turn folders and streams of sound into discrete units.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (tokenize, synth, fit, models, show, stream, verify, convert):
    app.command()(command)
app.add_typer(train)
app.add_typer(evaluate, name="evaluate")


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from speechtok import __version__

        typer.echo(f"speechtok {__version__}")
        raise typer.Exit


class _Interrupted(BaseException):
    """Ctrl-C. Typer would swallow a KeyboardInterrupt without a word."""


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted


def main() -> None:
    """Entry point: errors of the user become one line on standard error."""
    from speechtok.errors import SpeechtokError

    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except SpeechtokError as error:
        sys.stderr.write(f"speechtok: {error}\n")
        sys.exit(1)
    except _Interrupted:
        sys.stderr.write("speechtok: interrupted; finished work is kept, run the same command again to go on\n")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (| head): nothing is wrong with us.
        sys.stderr.close()
        sys.exit(0)
