"""The command line. Words in, tables out; `--json` prints one object and nothing else.

Commands import what they need when they run: `evenbits --help` never imports torch.
"""

from __future__ import annotations

import contextlib
import sys

import typer

from evenbits import __version__
from evenbits.cli.advise import advise
from evenbits.cli.bench import bench
from evenbits.cli.comms import comms
from evenbits.cli.demo import demo
from evenbits.cli.detach import ending_cleanly
from evenbits.cli.diagnose import diagnose
from evenbits.cli.evaluate import evaluate
from evenbits.cli.inspect import inspect
from evenbits.cli.monitor import monitor
from evenbits.cli.output import Interrupted
from evenbits.cli.quantize import quantize
from evenbits.cli.sweep import sweep
from evenbits.cli.table import table
from evenbits.errors import EvenbitsError

_INTERRUPTED = 130

app = typer.Typer(
    name="evenbits",
    help="Neural networks on few, evenly used bits, with proof of what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(quantize)
app.command()(advise)
app.command()(evaluate)
app.command()(bench)
app.command()(inspect)
app.command()(monitor)
app.command()(table)
app.command()(sweep)
app.command()(diagnose)
app.command()(demo)
app.add_typer(comms, name="comms")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"evenbits {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Neural networks on few, evenly used bits, with proof of what it cost."""


def main() -> None:
    """Entry point. User errors end in one line on standard error and exit code 1; wrong options exit with 2."""
    try:
        with ending_cleanly():
            app()
    except EvenbitsError as error:
        print(f"evenbits: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except Interrupted as end:
        _last_word(f"interrupted; {end}")
        raise SystemExit(_INTERRUPTED) from None
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:  # which typer makes of Ctrl-C, without a word
            raise
        _last_word("interrupted; nothing was written.")
        raise SystemExit(_INTERRUPTED) from None


def _last_word(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"evenbits: {text}", file=sys.stderr)
