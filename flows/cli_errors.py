"""Exit codes and messages of the command line: one clear message, never a traceback by default."""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer
from typer.exceptions import TyperException

_P = ParamSpec("_P")
_T = TypeVar("_T")

FAILED, WRONG_USAGE, STOPPED = 1, 2, 3

# By name: the classes live in modules that are too heavy to import for `--help`.
_WRONG_USAGE = {
    *("ConfigError", "RunExists", "UnknownRun", "UnknownModel", "ClassesMismatch"),
    *("UnknownSample", "OutputMismatch", "UnknownWorkPool", "UnknownBlock"),
    *("NotWaiting", "AlreadyDecided", "DeploymentOutOfReach"),
}
_STOPPED = {
    "StoppedOnRequest",
    "WaitingForApproval",
    "TrainingStopped",
    "LabelingStopped",
    "GuardStopped",
    "TerminationSignal",
}


def reporting_errors(command: Callable[_P, _T]) -> Callable[_P, _T]:
    """Turn exceptions of a command into a message on stderr and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return command(*args, **kwargs)
        except (TyperException, typer.Exit, SystemExit):  # typer's own, with its exit codes
            raise
        except KeyboardInterrupt:
            _say("stopped")
            sys.exit(STOPPED)
        except BaseException as error:
            if os.environ.get("SELFTRAIN_DEBUG") == "1":
                raise
            name = type(error).__name__
            if name in _STOPPED:
                _say(str(error))
                sys.exit(STOPPED)
            _say(f"error: {error}" if str(error) else f"error: {name}")
            if not isinstance(error, ValueError | OSError) and name not in _WRONG_USAGE:
                _say(f"({name}; SELFTRAIN_DEBUG=1 shows where it happened)")
            sys.exit(WRONG_USAGE if name in _WRONG_USAGE else FAILED)

    return wrapped


def _say(message: str) -> None:
    print(message, file=sys.stderr)
