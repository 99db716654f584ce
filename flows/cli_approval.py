"""The command that answers what a run asks: `selftrain approve`."""

import getpass
import socket
from typing import Annotated

import typer

from flows.cli_errors import reporting_errors
from flows.cli_options import Json, Run, Store, print_json, store_url


@reporting_errors
def approve(
    run: Run,
    reject: Annotated[
        bool, typer.Option("--reject", help="Say no: the loop ends with the model before.")
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(help="Confidence that later rounds select by, 0 to 1.", min=0, max=1),
    ] = None,
    comment: Annotated[str, typer.Option(help="Why; kept in the store.")] = "",
    by: Annotated[
        str | None, typer.Option(help="Who answers; else the user of this machine.")
    ] = None,
    round_index: Annotated[
        int | None,
        typer.Option("--round", help="The round that is meant; refuse if the run asks of another."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on with the run: by a new flow run of the deployment that started it, or here"
            " and now if none did.",
        ),
    ] = True,
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Answer a run that waits for approval (`approve` in its config), and go on with it.

    The answer is recorded in the store once, with who and when, before the run goes on.

    Example: `selftrain approve my-run --round 1 --threshold 0.8 --comment "looks balanced"`
    """
    from flows.approvals import answer
    from flows.going_on import go_on_by_deployment
    from flows.opening import reopen_run
    from flows.running import resume_command, run_and_show
    from flows.terminal import err
    from storage.store import open_store

    opened = open_store(store_url(store), check_writable=True)
    approval, is_new = answer(
        opened,
        run,
        "reject" if reject else "accept",
        by=by or _user(),
        threshold=threshold,
        comment=comment,
        round_index=round_index,
    )
    config = reopen_run(opened, run).config.model_copy(update={"store": opened.url})
    recorded = "recorded" if is_new else "was recorded before"
    err.print(f"{recorded}: {approval.in_words()}", highlight=False, markup=False, soft_wrap=True)
    answered = {"run": run, "store": opened.url, **approval.to_json()}
    if resume:
        goes_on = go_on_by_deployment(opened, run)
        if goes_on is None:
            run_and_show(config, as_json)
            return
        err.print(f"{run} {goes_on.in_words()}", highlight=False, soft_wrap=True)
        answered |= goes_on.ids()
    else:
        err.print(f"go on with: {resume_command(config)}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(answered)


def _user() -> str:
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # no entry in the password database, as in many containers
        raise typer.BadParameter(
            "this machine does not know who you are: say it with --by"
        ) from None
