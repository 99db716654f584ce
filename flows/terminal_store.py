"""What `gc` shows."""

import time

from flows.collecting import Garbage
from flows.first_choices import bytes_in_words
from flows.terminal import out, titled_table

_MAX_ROWS = 40
_DAY = 86_400


def print_garbage(garbage: Garbage) -> None:
    """Print the largest units, their sum, and what to do next."""
    is_deleted = garbage.is_deleted
    title = "deleted from" if is_deleted else "not referred to by any run in"
    table = titled_table(f"{title} {garbage.store.url}")
    for name in ["what", "objects", "bytes", "age", ""]:
        table.add_column(name, justify="left" if name in ("what", "") else "right")
    now = time.time()
    largest = sorted(garbage.units, key=lambda unit: -unit.num_bytes)
    for unit in largest[:_MAX_ROWS]:
        age = "" if unit.modified is None else f"{(now - unit.modified) / _DAY:.1f} d"
        skipped = garbage.skipped.get(unit.path)
        note = "" if skipped is None else f"kept: {skipped}"
        size = bytes_in_words(unit.num_bytes)
        table.add_row(unit.path, f"{len(unit.objects):,}", size, age, note)
    out.print(table)
    if len(largest) > _MAX_ROWS:
        out.print(f"and {len(largest) - _MAX_ROWS:,} smaller ones", highlight=False)
    sums = f"{len(garbage.units):,} units, {bytes_in_words(garbage.num_bytes)}"
    if garbage.temporary:
        sums += f", {len(garbage.temporary):,} files of killed writers"
    kept = f"{garbage.num_referenced:,} are referred to, {garbage.num_young:,} too young"
    out.print(f"{sums}; of the others {kept}", highlight=False)
    if not is_deleted and (garbage.units or garbage.temporary):
        out.print("nothing was deleted: --delete does", highlight=False)
