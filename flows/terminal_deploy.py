"""What `selftrain deploy` prints for people."""

from flows.deploying import Deployed
from flows.terminal import out, titled_table


def print_deployed(deployed: Deployed) -> None:
    """Print a line for each deployment, and what the workers have to be started with."""
    table = titled_table(f"deployed to {deployed.api_url}")
    for name in ["deployment", "work pool", "schedule"]:
        table.add_column(name, overflow="fold")
    for one in deployed.deployments:
        table.add_row(one["name"], one["work_pool"], one["schedule"])
    out.print(table)
    for pool in deployed.work_pools:
        made = "made now" if pool["created"] else "was there"
        out.print(
            f"work pool {pool['name']} ({pool['type']}, {made}); a worker of it:"
            f" prefect worker start --pool {pool['name']} --type {pool['type']}",
            soft_wrap=True,
            highlight=False,
        )
    for automation in deployed.automations:
        out.print(f"automation {automation['name']}", soft_wrap=True, highlight=False)
    for limit in deployed.limits:
        out.print(f"concurrency limit {limit['name']}: {limit['limit']}", highlight=False)
    run = deployed.deployments[0]["name"]
    out.print(f"a run now: prefect deployment run {run}", soft_wrap=True, highlight=False)
