"""Label groups of shards as they are sent: `python -m tasks.label_worker`; imports no Prefect.

One JSON object a line. In on stdin: {"job": ..., "stems": [...]}. Out on stdout, for each shard
that is committed: {"done": samples}; for each group, at its end: {"ended": "ok" | "stopped"}, or
{"ended": "refused" | "failed", "error": class, "message": ...}. What libraries print goes to
stderr. Ends with its input.
"""

import argparse
import json
import os
import signal
import sys
import traceback
from typing import Any, TextIO

from tasks.decode_server import start_decode_server
from tasks.kept_memory import keep_freed_memory

# What the user's input or the computation itself causes comes back on every try.
REFUSALS = (ValueError, TypeError, KeyError, FileNotFoundError, PermissionError)


def main(arguments: list[str] | None = None) -> int:
    """Serve until stdin ends; after SIGTERM a group ends with its shard in progress."""
    parser = argparse.ArgumentParser(prog="python -m tasks.label_worker", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument(
        "--decoders", type=int, default=0, help="processes that decode beside a GPU"
    )
    options = parser.parse_args(arguments)
    keep_freed_memory()
    # Stdout is the parent's: nothing that a library prints may get in between.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if options.decoders:
        start_decode_server()
    # Now, for these import torch, and so does the server: they do it at the same time.
    import torch

    from tasks.label_jobs import LabelJob, label_group

    torch.set_num_threads(options.threads)
    is_stopping = False

    def stop(signum: int, frame: object) -> None:
        nonlocal is_stopping
        is_stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent decides
    for line in sys.stdin:
        order = json.loads(line)
        try:
            job = LabelJob.from_json(order["job"])
            stems, decoders = order["stems"], options.decoders
            for num_samples in label_group(job, stems, decode_processes=decoders):
                _answer(answers, {"done": num_samples})
                if is_stopping:
                    break
        except Exception as error:
            traceback.print_exc()
            _answer(answers, _failure(error))
        else:
            _answer(answers, {"ended": "stopped" if is_stopping else "ok"})
    return 0


def _failure(error: Exception) -> dict[str, Any]:
    ended = "refused" if isinstance(error, REFUSALS) else "failed"
    return {"ended": ended, "error": type(error).__name__, "message": str(error)}


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # All that was labelled is committed and answered. To take the interpreter apart with all of
    # torch in it costs a second, for which the labelling would wait.
    os._exit(code)
