"""The shell around the commands: what each is called, and how errors leave."""

import errno
import sys
from collections.abc import Callable
from typing import Any

import typer

from funcloss.app.cli.audit import audit
from funcloss.app.cli.check import check
from funcloss.app.cli.evaluate import evaluate
from funcloss.app.cli.export import export
from funcloss.app.cli.output import hush, say
from funcloss.app.cli.predict import predict
from funcloss.app.cli.stopping import INTERRUPTED
from funcloss.app.cli.sweep import sweep
from funcloss.app.cli.train import train
from funcloss.app.cli.version import Version
from funcloss.errors import FunclossError


def _group(version: Version = False) -> None:
    """Loss functions for mistakes that do not cost the same."""


def _app(**settings: Any) -> typer.Typer:
    names = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(pretty_exceptions_enable=False, context_settings=names, **settings)


app = _app(no_args_is_help=True, callback=_group)
for command in (train, evaluate, predict, export, check, audit, sweep):
    app.command()(command)

train_app = _app(add_completion=False)
train_app.command()(train)


def main() -> None:
    """Run ``funcloss``."""
    _run(app)


def main_train() -> None:
    """Run ``funcloss-train``."""
    _run(train_app)


def _run(program: Callable[[], Any]) -> None:
    """Run a command; what a user can mend leaves as one line on stderr, never as a traceback."""
    try:
        try:
            program()
        finally:
            if sys.stdout is not None:  # closed by whoever started the command
                sys.stdout.flush()
    except FunclossError as error:
        say(f"error: {error}", error=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        # Typer turns Ctrl-C into an exit of its own, without a word.
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            say(
                "error: not enough memory: try a smaller --batch-size or --image-size, or --stream "
                "on; a run folder that is begun goes on with --resume",
                error=True,
            )
            sys.exit(1)
        # Torch raises it wherever the training is when a process that reads ahead dies.
        if "DataLoader worker" not in str(error):
            raise
        text = str(error).splitlines()[0]
        say(f"error: reading ahead failed: {text}; try --workers 0", error=True)
        sys.exit(1)
    except BrokenPipeError:  # whoever read our output, `head` say, has seen enough
        hush()
        sys.exit(1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        hush()
        say(f"error: cannot print the result: {error.strerror}", error=True)
        sys.exit(1)


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether the machine or its GPU has no more, without loading torch to ask."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)
