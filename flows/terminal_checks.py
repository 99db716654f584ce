"""What `doctor` shows."""

from flows.checks import Check
from flows.terminal import out, titled_table

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def print_checks(checks: list[Check]) -> None:
    """Print a line for each check, and below it what to do."""
    table = titled_table(None)
    for name in ["", "what", "found"]:
        table.add_column(name, overflow="fold")
    for check in checks:
        remedy = f"\n-> {check.remedy}" if check.remedy else ""
        style = _STYLES[check.level]
        table.add_row(f"[{style}]{check.level}[/]", check.name, _plain(f"{check.found}{remedy}"))
    out.print(table)
    counts = {level: sum(check.level == level for check in checks) for level in _STYLES}
    out.print(", ".join(f"{count} {level}" for level, count in counts.items()), highlight=False)


def _plain(text: str) -> str:
    """Keep square brackets from being read as rich's markup."""
    return text.replace("[", "\\[")
