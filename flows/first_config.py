"""A first config for a user's data: every choice with its reason and, where known, its cost.

The rules are simple on purpose and are written beside what they chose, so that a user who knows
better can tell what to change.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from flows.first_choices import (
    ROUNDS,
    UNLABELED_RATIO,
    Network,
    bytes_in_words,
    choose_batch_size,
    choose_cache,
    choose_crop,
    choose_ema_decay,
    choose_steps,
    time_in_words,
)
from flows.first_look import FirstLook
from flows.machine import Machine
from tasks.rates import Rates

_WIDTH = 100


@dataclass(frozen=True)
class FirstConfig:
    """A config and what is said about it.

    Attributes:
        text: YAML with comments.
        choices: dotted key -> (value, why).
        estimated_seconds: of `teacher`, one `label`, one `student`, the `baseline` and `all`.
    """

    text: str
    choices: Mapping[str, tuple[Any, str]]
    estimated_seconds: Mapping[str, float]


@dataclass
class _Writer:
    """Collects lines of YAML with a comment before each choice."""

    lines: list[str] = field(default_factory=list[str])
    choices: dict[str, tuple[Any, str]] = field(default_factory=dict[str, tuple[Any, str]])
    _section: str = ""

    def say(self, text: str) -> None:
        self._comment(text, "")

    def section(self, line: str, why: str) -> None:
        self._comment(why, "")
        self.lines.append(line)
        self._section = line.partition(":")[0]

    def choose(self, key: str, value: Any, why: str) -> None:
        indent = "  " if self._section else ""
        self._comment(why, indent)
        self.lines.append(f"{indent}{key}: {_flow(value)}")
        self.choices[f"{self._section}.{key}" if self._section else key] = value, why

    def top(self) -> None:
        self._section = ""

    def _comment(self, text: str, indent: str) -> None:
        width = _WIDTH - len(indent) - 2
        wrapped = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
        self.lines += [f"{indent}# {line}" for line in wrapped]


def write_first_config(
    look: FirstLook,
    machine: Machine,
    network: Network,
    rates: Rates,
    *,
    name: str,
    store: str,
    cache_free_bytes: int | None = None,
    cache_dir: str = "",
) -> FirstConfig:
    """Return the config for what was seen.

    Args:
        look: the data.
        machine: its devices.
        network: from `choose_network`.
        rates: of that network here.
        name: of the run.
        store: as the user named it.
        cache_free_bytes: room under `cache_dir`.
        cache_dir: folder on a local disk for a cache of shards, should one pay.
    """
    labels, corpus = (look.corpora[split] for split in ("labeled", "unlabeled"))
    batch = choose_batch_size(labels.num_samples, network, machine)
    steps = choose_steps(labels.num_samples, corpus.num_samples, batch, machine)
    costs = {
        "teacher": steps["teacher"] * batch / rates.training,
        "label": corpus.num_samples / rates.labeling,
        "student": steps["student"] * batch * (1 + UNLABELED_RATIO) / rates.training,
    }
    costs["baseline"] = costs["student"]
    costs["all"] = costs["teacher"] + ROUNDS * (costs["label"] + costs["student"])
    costs["all"] += costs["baseline"]
    writer = _Writer()
    _say_what_was_seen(writer, look, machine, rates, costs)
    writer.lines.append("schema: 1")
    writer.choose("name", name, "The run's name in the store; a changed config needs another one.")
    writer.choose("store", store, "Where everything is kept: a folder, or s3://bucket/prefix.")
    writer.choose("seed", 0, "Another seed is another run, of the same cost.")
    round_cost = time_in_words(costs["label"] + costs["student"])
    writer.choose(
        "rounds",
        ROUNDS,
        f"As in Xie et al. 2020. Each costs about {round_cost}; a student that is worse on dev than"
        " its teacher ends the run before.",
    )
    _write_data(writer, look)
    _write_trainings(writer, look, machine, network, costs, batch, steps)
    _write_rules(writer, look, network, costs)
    _write_machine(writer, look, machine, costs, cache_free_bytes, cache_dir)
    text = "\n".join(writer.lines) + "\n"
    return FirstConfig(text, writer.choices, costs)


def _say_what_was_seen(
    writer: _Writer, look: FirstLook, machine: Machine, rates: Rates, costs: Mapping[str, float]
) -> None:
    counts = look.label_counts
    splits = ", ".join(f"{corpus.num_samples:,} {s}" for s, corpus in look.corpora.items())
    where = f"{machine.gpus} GPUs" if machine.gpus else f"a CPU of {machine.cores} cores"
    writer.say(
        f"Written by `selftrain init`. It saw {splits} images of {len(counts)} classes,"
        f" {min(counts.values()):,} to {max(counts.values()):,} labels each, shorter sides of"
        f" {look.sizes.smallest} to {look.sizes.largest} pixels, and {where}."
    )
    writer.say(
        "Costs are of arithmetic alone, without decoding and noise, at the rates that init measured"
        f" here on noise: {rates.training:,.0f} images/s to train, {rates.labeling:,.0f} to label."
        f" Together about {time_in_words(costs['all'])}. `selftrain plan` knows better once the"
        " first stages are done."
    )
    for warning in look.warnings:
        writer.say(f"Warning: {warning}.")


def _write_data(writer: _Writer, look: FirstLook) -> None:
    made = "Shards that were there." if look.made_by is None else f"Made of {look.made_by}."
    writer.section("data:", made)
    if look.root:
        writer.choose("root", look.root, "Goes before the four below.")
    reasons = {
        "labeled": "What teachers and students learn from.",
        "dev": "Calibrates, promotes and stops; never trained on.",
        "test": "Opened once a round by a stage that nothing reads.",
        "unlabeled": "What teachers label.",
    }
    for split, why in reasons.items():
        if split in look.patterns:
            corpus = look.corpora[split]
            shards = "a shard" if len(corpus.shards) == 1 else f"{len(corpus.shards):,} shards"
            size = f"{corpus.num_samples:,} images in {shards}"
            writer.choose(split, look.patterns[split], f"{why} {size}.")
    writer.top()
    unreadable = look.sizes.unreadable
    per_shard = max(s.num_samples for c in look.corpora.values() for s in c.shards)
    share = 2 * unreadable / look.sizes.looked_at
    writer.choose(
        "max_bad_samples",
        max(10, round(share * per_shard)) if unreadable else 0,
        f"{unreadable} of {look.sizes.looked_at} images could not be read: twice their share of a"
        " shard may be passed over; they are counted and listed."
        if unreadable
        else "The heads of all images that were looked at could be read. One that cannot be decoded"
        " is an error; a number is how many of a shard may be passed over.",
    )


def _write_trainings(
    writer: _Writer,
    look: FirstLook,
    machine: Machine,
    network: Network,
    costs: Mapping[str, float],
    batch: int,
    steps: Mapping[str, int],
) -> None:
    labels = look.corpora["labeled"].num_samples
    writer.section(
        "teacher: &network",
        f"Round 0, on the labels alone: about {time_in_words(costs['teacher'])}.",
    )
    for key, value, why in zip(
        ("architecture", "image_size", "precision"),
        (network.architecture, network.image_size, network.precision),
        network.why,
        strict=True,
    ):
        writer.choose(key, value, _sentence(why))
    writer.choose(
        "batch_size",
        batch,
        f"Labels a step, of {labels:,}; a student reads {UNLABELED_RATIO} pseudo-labelled images"
        " more for each. Lower it if memory runs out.",
    )
    parts = max(1, machine.gpus)
    if parts > 1:
        writer.choose(
            "accumulation_steps", parts, "One part of a step for each GPU: batches split evenly."
        )
    passes = steps["teacher"] * batch / labels
    teacher_steps = {"steps": steps["teacher"]}
    writer.choose("duration", teacher_steps, f"{passes:.0f} passes over the labels.")
    writer.choose("warmup", {"steps": steps["teacher"] // 20}, "A twentieth of the training.")
    writer.choose(
        "optimizer",
        {"kind": "adamw", "lr": 0.003, "weight_decay": 0.01},
        "Forgiving; for batches of 256 and more try twice the rate.",
    )
    writer.choose(
        "ema",
        {"decay": choose_ema_decay(steps["teacher"]), "tf_ramp": True},
        "The averaged weights are used; they remember about the last tenth of the training.",
    )
    writer.choose(
        "objective",
        {"label_smoothing": 0.1, "loss_normalization": "concat_mean"},
        "Labels and pseudo-labels count alike, image by image.",
    )
    crop = choose_crop(network.image_size)
    writer.choose(
        "noise",
        {"crop": crop, "horizontal_flip": True},
        "Mild, for a teacher. Mirror images must show the same class: set horizontal_flip: false"
        " for text, digits or left and right, here and below.",
    )
    writer.section(
        "student:", f"Every round's student: about {time_in_words(costs['student'])} a round."
    )
    writer.lines.append("  <<: *network")
    writer.choose("unlabeled_ratio", UNLABELED_RATIO, "Each more adds a batch to every step.")
    corpus = look.corpora["unlabeled"].num_samples
    passes = steps["student"] * batch * UNLABELED_RATIO / corpus
    writer.choose(
        "duration",
        {"steps": steps["student"]},
        f"{passes:.1f} passes over the corpus, were all of it kept. Twice the steps cost twice.",
    )
    writer.choose("warmup", {"steps": steps["student"] // 20}, "A twentieth of the training.")
    writer.choose(
        "ema", {"decay": choose_ema_decay(steps["student"]), "tf_ramp": True}, "As above."
    )
    magnitude = 5 if network.image_size <= 64 else 9
    writer.choose(
        "noise",
        {
            "crop": crop,
            "horizontal_flip": True,
            "randaugment": {"num_ops": 2, "magnitude": magnitude},
            "dropout": 0.2,
        },
        "A student must learn under more noise than its teacher: that is the method.",
    )
    writer.top()


def _write_rules(
    writer: _Writer, look: FirstLook, network: Network, costs: Mapping[str, float]
) -> None:
    num_classes, num_dev = len(look.class_names), look.corpora["dev"].num_samples
    corpus = look.corpora["unlabeled"].num_samples
    row_bytes = 60 + 2 * num_classes if num_classes <= 256 else 120
    writer.section(
        "labeling:",
        f"Each round labels {corpus:,} images: about {time_in_words(costs['label'])}, and"
        f" {bytes_in_words(corpus * row_bytes)} in the store.",
    )
    writer.choose("precision", network.precision, "As in training.")
    writer.section("selection:", "Which labels a student learns from. Costs seconds to minutes.")
    is_large_enough = look.sizes.median >= 32
    writer.choose(
        "leak_guard",
        {"kind": "near_duplicates" if is_large_enough else "none"},
        "Copies of dev and test images in the corpus would make accuracies look better than they"
        " are; one pass over the corpus, once."
        if is_large_enough
        else "Images below 32 pixels look too much alike to tell copies: keep dev and test images"
        " out of the corpus yourself.",
    )
    writer.choose(
        "calibration",
        "temperature" if num_dev >= 50 else "none",
        f"Fitted on the {num_dev:,} dev images, so that a confidence of 0.8 is right in 80 %."
        if num_dev >= 50
        else f"{num_dev} dev images are too few to fit a temperature on.",
    )
    confidence = 0.3 if num_classes >= 10 else round((1 + 1 / num_classes) / 2, 2)
    writer.choose(
        "threshold",
        {"kind": "fixed", "confidence": confidence},
        "The paper's 0.3: low, since soft labels tell how sure the teacher is. Higher keeps fewer"
        " and cleaner labels."
        if num_classes >= 10
        else f"Half-way between chance, 1 in {num_classes}, and certainty.",
    )
    writer.choose(
        "balance",
        {"kind": "ns_binned", "k": "median", "upsample": True, "max_copies": 10},
        "Every class gets as many pseudo-labels as the median one has: thinned, or repeated 10"
        " times at most. {kind: none} where the corpus has the classes as you want them.",
    )
    writer.choose("target", "soft", "The teacher's distribution; hard: its class alone.")
    writer.top()
    writer.choose(
        "baseline",
        True,
        "The same network and budget on labels alone, which says what the pseudo-labels are worth:"
        f" about {time_in_words(costs['baseline'])}.",
    )


def _write_machine(
    writer: _Writer,
    look: FirstLook,
    machine: Machine,
    costs: Mapping[str, float],
    cache_free_bytes: int | None,
    cache_dir: str,
) -> None:
    writer.say("Below: how it is computed. None of it changes a result; `resume --set` may.")
    writer.choose("device", "auto", f"Here: {machine.device}.")
    if machine.gpus > 1:
        writer.choose(
            "launch", {"processes": "auto"}, f"A training uses all {machine.gpus} GPUs together."
        )
    else:
        one = "one GPU" if machine.gpus else "one CPU"
        writer.choose("launch", {"processes": 1}, f"One process a training: there is {one}.")
    units = f"{machine.gpus} GPUs" if machine.gpus else f"{machine.cores} cores"
    writer.choose(
        "engine",
        {"processes": "auto"},
        f"Labels with a process for each of {units} of this machine.",
    )
    cache, why = choose_cache(look, cache_free_bytes, cache_dir)
    writer.choose("cache", cache, why)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _flow(value: Any) -> str:
    dumped = yaml.safe_dump(
        value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    )
    return dumped.removesuffix("...\n").strip()
