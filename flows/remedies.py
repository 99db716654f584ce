"""What the state of a failed flow run says: what went wrong, and how to go on."""

from flows.opening import OpenRun

_LONGEST_ERROR = 2000


def what_to_do(error: Exception, run: OpenRun | None) -> str:
    """Return the message of a failed run's state.

    Args:
        error: what ended it; its own text says what, where, and what to mend.
        run: None where the run was refused before it was opened.
    """
    message = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
    if run is None:
        return f"{message}\nNothing was computed: mend config or data, and start the run again."
    return (
        f"{message}\nFinished stages are in the store. Once the cause is mended, Retry goes on, or:"
        f" selftrain resume {run.name} --store {run.store.url}"
    )
