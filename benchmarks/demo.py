"""Does self-training pay on the demo? Five seeds of the whole pipeline, paired differences on test.

Seeds move the split, the weights and the noise. Nothing was chosen on these seeds' test images: the
recipe was written down at once, and its network was then made smaller for speed.
"""

import statistics
import sys
import tempfile
import time

from benchmarks.figures import benchmark_parser, figure, print_figures
from flows import running  # noqa: F401  (sets Prefect's environment)
from flows.loading import load_config
from flows.self_training import self_training
from flows.server import prefect_server
from flows.terminal import showing_progress


def main() -> None:
    parser = benchmark_parser(__doc__, quick="two seeds of one short round")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    overrides = list(options.set)
    seeds = options.seeds
    if options.quick:
        seeds = seeds[:2]
        overrides += ["rounds=1", "teacher.duration.steps=100", "student.duration.steps=100"]
    rows = []
    with tempfile.TemporaryDirectory(prefix="selftrain-demo-") as store, prefect_server():
        for seed in seeds:
            rows.append(_run(seed, f"{store}/seed-{seed}", overrides))
            print(_line(rows[-1]), file=sys.stderr)
    against_baseline = [row["student"] - row["baseline"] for row in rows]
    against_teacher = [row["student"] - row["teacher"] for row in rows]
    for name, split in (("test", ""), ("dev", "_dev")):
        for model in ("teacher", "baseline", "student"):
            values = [100 * row[model + split] for row in rows]
            print(f"{name} {model}: {_mean_and_deviation(values)}", file=sys.stderr)
    figures = []
    for name, differences, against in (
        ("baseline", against_baseline, "the supervised baseline of the same budget"),
        ("teacher", against_teacher, "its first teacher"),
    ):
        shared = {"quick": options.quick, "seeds": seeds, "against": against}
        points = [100 * d for d in differences]
        print(f"student - {name}, points: {[round(p, 2) for p in points]}", file=sys.stderr)
        error = statistics.stdev(points) / len(points) ** 0.5
        mean = statistics.mean(points)
        figures.append(
            figure(
                f"demo_student_minus_{name}",
                mean,
                "points of test accuracy",
                goal=2 * error,
                direction="at_least",
                **shared,
            )
        )
    print_figures(
        [
            *figures,
            figure(
                "demo_seconds",
                statistics.mean(row["seconds"] for row in rows),
                "s a run",
                goal=300,
                direction="at_most",
                against="five minutes for the whole demo",
                quick=options.quick,
                seeds=seeds,
            ),
        ],
        as_json=options.json,
    )


def _run(seed: int, store: str, overrides: list[str]) -> dict[str, float]:
    config = load_config("demo", overrides=[f"seed={seed}", *overrides], name=f"seed-{seed}")
    started = time.monotonic()
    with showing_progress():
        status = self_training(config.model_copy(update={"store": store}))
    first, last, baseline = status["rounds"][0], status["rounds"][-1], status["baseline"]
    return {
        "seed": seed,
        "rounds": last["round_index"],
        "teacher": first["test_accuracy"],
        "student": last["test_accuracy"],
        "baseline": baseline["test_accuracy"],
        "teacher_dev": first["dev_accuracy"],
        "student_dev": last["dev_accuracy"],
        "baseline_dev": baseline["dev_accuracy"],
        "precision": last["pseudo_labels"]["precision"],
        "seconds": time.monotonic() - started,
    }


def _line(row: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in row.items())


def _mean_and_deviation(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    shown = ", ".join(f"{value:.2f}" for value in values)
    return f"{statistics.mean(values):.2f} +- {deviation:.2f} ({shown})"


if __name__ == "__main__":
    main()
