"""Sections of a run's config by themselves: of a YAML file, or of a few options."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from flows.engine_config import LOCAL_ENGINE, EngineConfig
from flows.loading import ConfigError, StrictLoader
from tasks.labeling import LabelingConfig
from tasks.selection_config import SelectionConfig

_Section = TypeVar("_Section", bound=BaseModel)


def labeling_from_file(path: Path, *, has_dev: bool) -> LabelingConfig:
    """Read how to label from a YAML file.

    Raises: ConfigError, naming every key at fault.
    """
    return _labeling(_read(path, "labeling"), where=f"--config {path}", has_dev=has_dev)


def labeling_from_options(
    *, precision: str | None, batch_size: int | None, has_dev: bool
) -> LabelingConfig:
    """Put the usual settings together; what is None is the default of a run's config."""
    options = {"precision": precision, "batch_size": batch_size}
    given = {name: value for name, value in options.items() if value is not None}
    return _labeling(given, where="options", has_dev=has_dev)


def engine_from_option(text: str | None) -> EngineConfig:
    """Read where to label from an option: YAML as in a run's config, or a kind alone.

    Args:
        text: None for this machine.
    Raises: ConfigError, naming every key at fault.
    """
    if text is None:
        return LOCAL_ENGINE
    try:
        document = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--engine {text}: {error}") from None
    engine: TypeAdapter[EngineConfig] = TypeAdapter(EngineConfig)
    with _naming_faults(f"--engine {text}"):
        return engine.validate_python({"kind": document} if isinstance(document, str) else document)


def rules_from_file(path: Path, *, has_dev: bool) -> SelectionConfig:
    """Read the rules of a selection from a YAML file.

    Without a dev split nothing can be calibrated: where the file does not say otherwise, nothing
    is.

    Raises: ConfigError, naming every key at fault.
    """
    return _rules(_read(path, "selection"), where=f"--config {path}", has_dev=has_dev)


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
    return _rules(document, where="options", has_dev=has_dev)


def _labeling(document: Mapping[str, Any], *, where: str, has_dev: bool) -> LabelingConfig:
    # The top_k form is calibrated on dev; without, every class is stored, however many.
    form = {} if has_dev else {"form": "full"}
    config = _checked(LabelingConfig, form | dict(document), where=where)
    if config.form != "full" and not has_dev:
        raise ConfigError(
            f"{where}: form={config.form} may be calibrated on labelled images: give them with"
            " --dev, or set form: full"
        )
    return config


def _rules(document: Mapping[str, Any], *, where: str, has_dev: bool) -> SelectionConfig:
    calibration = {} if has_dev else {"calibration": "none"}
    rules = _checked(SelectionConfig, calibration | dict(document), where=where)
    if rules.calibration != "none" and not has_dev:
        raise ConfigError(
            f"{where}: calibration={rules.calibration} is fitted on labelled images: give them with"
            " --dev, or set calibration: none"
        )
    return rules


def _read(path: Path, section: str) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"--config {path}: expected the keys of `{section}` of a run's config")
    return document


def _checked(section: type[_Section], document: Mapping[str, Any], *, where: str) -> _Section:
    with _naming_faults(where):
        return section.model_validate(document)


@contextmanager
def _naming_faults(where: str) -> Generator[None]:
    try:
        yield
    except ValidationError as error:
        problems = [
            f"  {'.'.join(map(str, one['loc'])) or '(all)'}: {one['msg']}"
            for one in error.errors(include_url=False)
        ]
        raise ConfigError("\n".join([f"{where}: what cannot be", *problems])) from None
