"""The rules of a selection without a run: of a YAML file, or of a few options."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flows.loading import ConfigError
from tasks.selection_config import SelectionConfig


def rules_from_file(path: Path, *, has_dev: bool) -> SelectionConfig:
    """Read the rules of a selection from a YAML file.

    Without a dev split nothing can be calibrated: where the file does not say otherwise, nothing
    is.

    Raises: ConfigError, naming every key at fault.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"--config {path}: expected the keys of `selection` of a run's config")
    return checked_rules(document, where=f"--config {path}", has_dev=has_dev)


def checked_rules(document: Mapping[str, Any], *, where: str, has_dev: bool) -> SelectionConfig:
    """Validate the rules of a selection; raises ConfigError, naming every key at fault."""
    calibration = {} if has_dev else {"calibration": "none"}
    try:
        rules = SelectionConfig.model_validate(calibration | dict(document))
    except ValidationError as error:
        problems = [
            f"  {'.'.join(map(str, one['loc'])) or '(all)'}: {one['msg']}"
            for one in error.errors(include_url=False)
        ]
        raise ConfigError(
            "\n".join([f"{where}: not the rules of a selection", *problems])
        ) from None
    if rules.calibration == "none" and has_dev:
        raise ConfigError(f"{where}: calibration=none reads no labelled images: leave --dev out")
    if rules.calibration != "none" and not has_dev:
        raise ConfigError(
            f"{where}: calibration={rules.calibration} is fitted on labelled images: give them with"
            " --dev, or set calibration: none"
        )
    return rules


def rules_from_options(
    *,
    confidence: float | None,
    per_class: int | None,
    max_copies: int | None,
    balance: str | None,
    debias: str | None,
    target: str | None,
    allow_collapse: bool,
    has_dev: bool,
    has_labeled: bool,
) -> SelectionConfig:
    """Put the usual rules together; what is None is the default of a run's config.

    A quota (`per_class`) means the most confident of each class, unless `balance` says otherwise;
    without one nothing is balanced.

    Raises: ConfigError for options that contradict each other.
    """
    balancing: dict[str, Any] = {"kind": balance or ("none" if per_class is None else "top_k")}
    for option, key, value in (
        ("--per-class", "k", per_class),
        ("--max-copies", "max_copies", max_copies),
    ):
        if value is None:
            continue
        if balancing["kind"] not in ("top_k", "ns_binned"):
            raise ConfigError(
                f"{option} has no effect with --balance {balancing['kind']}: use top_k or ns_binned"
            )
        balancing[key] = value
    document: dict[str, Any] = {"allow_collapse": allow_collapse, "balance": balancing}
    if confidence is not None:
        document["threshold"] = {"confidence": confidence}
    if target is not None:
        document["target"] = target
    if debias is not None:
        is_uniform = debias == "distribution_alignment" and not has_labeled
        document["debias"] = {"kind": debias} | ({"target": "uniform"} if is_uniform else {})
    return checked_rules(document, where="options", has_dev=has_dev)
