"""The command line. Every command is a thin translation of one library call.

Heavy modules are imported inside the commands, so that ``absynth --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from absynth import __version__
from absynth.cli.evaluation import attacks, certify, distal, evaluate, reproduce
from absynth.cli.explorer import explore
from absynth.cli.models import data, models, train
from absynth.cli.output import Stopped, note
from absynth.cli.pictures import classify
from absynth.cli.runs import compare, merge, report, verify
from absynth.cli.tour import quickstart
from absynth.errors import InputError

#: A command, option or value that does not exist: an exception of click, of which Typer may have a copy of its own.
_Misuse: Any = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _in_one_line(ctx):
            return super().parse_args(ctx, [_at_home(arg) for arg in args])

    def invoke(self, ctx: Any) -> Any:
        try:
            with _in_one_line(ctx):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped("nothing was lost that was finished; run the same command again") from None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)  # in the order below, not of the alphabet


def _at_home(arg: str) -> str:
    """``--out=~/runs`` with the home folder in full, which shells write out only after a space."""
    option, equals, value = arg.partition("=")
    return f"{option}={os.path.expanduser(value)}" if option.startswith("--") and equals else arg


@contextlib.contextmanager
def _in_one_line(context: Any) -> Iterator[None]:
    """Misuse as InputError, which names the help of the command, except that of no command at all: that shows the
    help."""
    try:
        yield
    except _Misuse as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        text = " ".join(error.format_message().split()).removesuffix(".")
        raise InputError(f"{text}; see '{(error.ctx or context).command_path} --help'") from error


app = typer.Typer(
    cls=_Commands,
    help="Image classifiers that explain what they see: analysis by synthesis (ABS).",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"absynth {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


app.command()(quickstart)
app.command()(data)
app.command()(models)
app.command()(train)
app.command()(classify)
app.command()(explore)
app.command()(evaluate)
app.command()(attacks)
app.command()(certify)
app.command()(report)
app.command()(verify)
app.command()(merge)
app.command()(compare)
app.command()(distal)
app.command()(reproduce)


def main() -> None:
    """Run the command line: bad input is one line on stderr and exit code 2, Ctrl-C 130, never a traceback."""
    # Threads that wait for one another sleep instead of spinning, which PyTorch's do unless told so before its import:
    # as fast on idle cores, ten times as fast where another program has one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What PyTorch's import makes all stays: looking for garbage among it again and again delays every command.
    gc.set_threshold(100_000)
    if "" not in sys.path:
        # A model given as module:factory may lie in the folder where the command is typed. Last in the search, so
        # that no file there hides a library.
        sys.path.append("")
    try:
        try:
            app(prog_name="absynth")
        finally:
            sys.stdout.flush()  # here, where a closed pipe is still caught
    except InputError as error:
        _fail(str(error), 2)
    except (Stopped, KeyboardInterrupt) as stop:
        note(f"stopped: {stop}" if str(stop) else "stopped")
        sys.exit(130)
    except OSError as error:
        _drop_stdout()
        if error.errno == errno.EPIPE:  # the reader, `head` for one, has seen enough
            sys.exit(1)
        place = f" {error.filename}" if error.filename else ""
        hint = "; free some space or choose another folder" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        _fail(f"{error.strerror or error}{place}{hint}", 2)
    except MemoryError:
        _fail("out of memory: ask for fewer images at a time", 2)
    except Exception as error:
        if os.environ.get("ABSYNTH_DEBUG"):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        _fail(f"a fault of absynth itself, {text}; please report it with what ABSYNTH_DEBUG=1 shows", 1)


def _fail(message: str, code: int) -> None:
    note(f"error: {message}")
    sys.exit(code)


def _drop_stdout() -> None:
    """Let what is still unwritten go nowhere, so that the interpreter does not stumble over it when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
