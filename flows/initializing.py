"""Look at data, choose, check that the config runs, and only then write it."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.first_choices import choose_network
from flows.first_config import FirstConfig, write_first_config
from flows.first_look import FirstLook, look_at_data
from flows.first_shards import Hints
from flows.loading import ConfigError, load_config
from flows.machine import Machine, free_bytes, this_machine
from flows.planning import PlannedStage, plan_run
from storage import local_files
from storage.store import Store, open_store
from tasks.rates import Rates

INIT_SCHEMA = 1
_NO_NAME = "mine"


@dataclass(frozen=True)
class Initialized:
    """A config that was written, and what it is made of.

    Attributes:
        path: of the config.
        name: of the run.
        store: that corpora were indexed into.
        look: the data.
        machine: its devices.
        rates: of the chosen network.
        config: what was written.
        stages: its plan.
    """

    path: Path
    name: str
    store: Store
    look: FirstLook
    machine: Machine
    rates: Rates
    config: FirstConfig
    stages: list[PlannedStage]

    def to_json(self) -> dict[str, Any]:
        """Return the documented form, schema 1."""
        look = self.look
        return {
            "schema": INIT_SCHEMA,
            "config": str(self.path),
            "name": self.name,
            "store": self.store.url,
            "made_by": look.made_by,
            "class_names": list(look.class_names),
            "label_counts": look.label_counts,
            "imbalance": look.imbalance,
            "splits": {
                split: {
                    "pattern": look.patterns[split],
                    "corpus": corpus.digest,
                    "samples": corpus.num_samples,
                    "shards": len(corpus.shards),
                    "bytes": corpus.num_bytes,
                }
                for split, corpus in look.corpora.items()
            },
            "images": look.sizes.to_json(),
            "machine": self.machine.to_json(),
            "free_bytes": free_bytes(self.store.url),
            "images_per_second": self.rates.to_json(),
            "estimated_seconds": dict(self.config.estimated_seconds),
            "warnings": list(look.warnings),
            "choices": {
                key: {"value": value, "why": why}
                for key, (value, why) in self.config.choices.items()
            },
        }


def initialize(
    source: str,
    hints: Hints,
    *,
    out: Path,
    shards: str | None,
    store_url: str,
    replace: bool = False,
) -> Initialized:
    """Write a config for a user's data, checked by planning it.

    Args:
        source: images or shards, see `look_at_data`.
        hints: what the user says beside.
        out: the config; whole or not at all, and nothing before everything else is done.
        shards: where shards are made of images; None: `<name of out>-shards` beside it.
        store_url: of the store that corpora are indexed into.
        replace: a config that is there.
    Raises: ConfigError if there is one and `replace` is not set, and for data that cannot become a
        run; StoreNotWritable.
    """
    if out.exists() and not replace:
        raise ConfigError(
            f"{out} is there already: give another --out, or --force to replace it. Shards and"
            " results stay as they are in any case"
        )
    store = open_store(store_url, check_writable=True)
    where = shards or str(out.with_name(f"{out.stem}-shards"))
    look = look_at_data(store, source, hints, shards=where)
    machine = this_machine()
    network = choose_network(look, machine)
    rates = network.rates(len(look.class_names))
    cache_dir = str(Path(tempfile.gettempdir()) / "selftrain-cache")
    name = run_name(out.stem)
    config = write_first_config(
        look,
        machine,
        network,
        rates,
        name=name,
        store=store_url,
        cache_free_bytes=free_bytes(cache_dir),
        cache_dir=cache_dir,
    )
    stages = _planned(store, config.text)
    local_files.write_atomically(out.absolute(), config.text.encode(), exclusive=not replace)
    return Initialized(out, name, store, look, machine, rates, config, stages)


def run_name(stem: str) -> str:
    """Return a file's stem as a run may be called: lower case, digits and dashes."""
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in stem.lower())
    return plain.strip("-")[:63].rstrip("-") or _NO_NAME


def _planned(store: Store, text: str) -> list[PlannedStage]:
    """Return the plan of a config that is not written yet; raises what `selftrain plan` would."""
    with tempfile.TemporaryDirectory(prefix="selftrain-init-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return plan_run(store, load_config(str(path)))
