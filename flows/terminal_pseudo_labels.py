"""What the command line shows of pseudo-labels that were written to a folder."""

from rich.markup import escape

from flows.terminal import out, titled_table
from tasks.publishing import PARTS_FOLDER, Publication


def print_predictions_written(folder: str, written: Publication) -> None:
    """Print how many images were labelled, and where the files lie."""
    index = written.index
    bad = len(index["bad_samples"])
    skipped = f"; {bad} could not be decoded and were skipped" if bad else ""
    _say(f"{index['labeled']:,} of {index['samples']:,} images labelled{skipped}")
    _say_where(folder, written)


def print_selection_written(folder: str, written: Publication) -> None:
    """Print the classes of a selection, its rules' findings, and where the files lie."""
    index = written.index
    table = titled_table(f"pseudo-labels in {escape(folder)}")
    for name in ("class", "predicted", "kept", "with copies"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for one in index["classes"]:
        counts = (f"{one[name]:,}" for name in ("predicted", "unique", "copies"))
        table.add_row(escape(one["name"]), *counts)
    out.print(table)
    _say(f"{index['unique']:,} of {index['samples']:,} images kept, {index['kept']:,} with copies")
    rejected = [
        f"{name.replace('_', ' ')} {count:,}"
        for name, count in index["reasons"].items()
        if count and name != "kept"
    ]
    _say(f"rejected: {', '.join(rejected) or 'none'}")
    if index["calibration"] == "none":
        _say("calibration: none; confidences are the model's own (--dev calibrates them)")
    else:
        before, after = (100 * index[name] for name in ("ece_before", "ece_after"))
        _say(f"calibration: {index['calibration']}, ECE on dev {before:.1f} % -> {after:.1f} %")
    if index["precision"] is not None:
        _say(f"precision: {100 * index['precision']:.1f} % of those with a known true label")
    _say_where(folder, written)


def _say_where(folder: str, written: Publication) -> None:
    files = len(written.index["parts"])
    place = f"{folder.rstrip('/')}/{PARTS_FOLDER}"
    _say(f"{files:,} files in {place}, {written.num_written:,} written now")
    _say(f'read them: pyarrow.parquet.read_table("{place}")')
    _say(f"store: {written.index['store']}")


def _say(line: str) -> None:
    out.print(line, soft_wrap=True, highlight=False, markup=False)
