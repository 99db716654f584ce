"""What a training carries from step to step, and its form in a checkpoint."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.architectures import Classifier, build_classifier
from models.objectives import build_objective
from models.optimization import build_optimizer
from models.training_config import TrainingConfig


@dataclass
class TrainingState:
    """Everything that an exact continuation needs beside the config, the seed and the data.

    The schedule, the noise and the position in the data are functions of `step`.

    Attributes:
        model: the weights that are trained.
        ema: their moving average, or None where the config has none.
        optimizer: over `model`.
        objective_state: of the objective.
        step: updates made so far.
    """

    model: Classifier
    ema: Classifier | None
    optimizer: torch.optim.Optimizer
    objective_state: dict[str, Tensor]
    step: int

    @property
    def final_model(self) -> Classifier:
        """What is evaluated, saved and labels: the average if there is one, else the model."""
        return self.model if self.ema is None else self.ema

    def tensors(self) -> dict[str, Tensor]:
        """CPU copies of all tensors: model.*, ema.*, optimizer.<parameter>.*, objective.*."""
        return {
            name: value.detach().to("cpu", copy=True).contiguous()
            for name, value in self._named_tensors()
        }

    def scalars(self) -> dict[str, int]:
        """The numbers that belong to `tensors()`; JSON."""
        return {
            "schema": 1,
            "step": self.step,
            "num_tensors": sum(1 for _ in self._named_tensors()),
        }

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, object]) -> None:
        """Take over what `tensors()` and `scalars()` gave, bit by bit, in place.

        Raises: ValueError if a tensor is missing, unknown or of another shape, which means that the
            checkpoint is of another config; the state is then half restored and must be dropped.
        """
        if scalars.get("schema") != 1:
            raise ValueError(
                f"checkpoint of schema {scalars.get('schema')!r}: this version reads schema 1"
            )
        if scalars.get("num_tensors") != len(tensors):
            raise ValueError(
                f"checkpoint with {len(tensors)} tensors where its record names "
                f"{scalars.get('num_tensors')}: it is incomplete"
            )
        step = scalars.get("step")
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"checkpoint with step {step!r}: must be a non-negative integer")
        groups = _grouped(tensors)
        _load_module(self.model, groups.pop("model", {}), "model")
        averages = groups.pop("ema", None)
        if (averages is None) != (self.ema is None):
            raise ValueError(
                f"checkpoint {'without' if averages is None else 'with'} a moving average where "
                f"the config has {'none' if self.ema is None else 'one'}"
            )
        if self.ema is not None and averages is not None:
            _load_module(self.ema, averages, "ema")
        self._load_optimizer(groups.pop("optimizer", {}))
        device = next(self.model.parameters()).device
        self.objective_state = {
            name: value.to(device, copy=True) for name, value in groups.pop("objective", {}).items()
        }
        if groups:
            raise ValueError(f"checkpoint with unknown tensors {sorted(groups)}")
        self.step = step

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.model.state_dict().items():
            yield f"model.{name}", value
        if self.ema is not None:
            for name, value in self.ema.state_dict().items():
                yield f"ema.{name}", value
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:  # SGD without momentum keeps a None
                    yield f"optimizer.{name}.{key}", value
        for name, value in self.objective_state.items():
            yield f"objective.{name}", value

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for full_name, saved in tensors.items():
            name, _, key = full_name.rpartition(".")
            if name not in parameters:
                raise ValueError(f"checkpoint with optimiser state of unknown parameter {name!r}")
            parameter = parameters[name]
            if saved.ndim == 0:
                value = saved.clone()  # AdamW's step counter stays on the CPU
            elif saved.shape == parameter.shape:
                value = torch.empty_like(parameter, dtype=saved.dtype, requires_grad=False)
                value.copy_(saved)
            else:
                raise ValueError(
                    f"checkpoint's optimizer.{full_name} has shape {tuple(saved.shape)}, the "
                    f"parameter {tuple(parameter.shape)}"
                )
            self.optimizer.state[parameter][key] = value


def initial_state(
    config: TrainingConfig, num_classes: int, *, seed: int, device: torch.device | str
) -> TrainingState:
    """Fresh weights, the same on every device; torch's global generator is left as it was.

    The average starts as a copy of the weights. On CUDA the weights lie channels-last.
    """
    with torch.random.fork_rng([]):  # pyright: ignore[reportUnknownMemberType]
        torch.default_generator.manual_seed(seed)
        model = build_classifier(
            config.architecture,
            num_classes,
            config.normalization,
            dropout=config.noise.dropout,
            stochastic_depth=config.noise.stochastic_depth,
        )
    target = torch.device(device)
    model.to(target)
    if target.type == "cuda":
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportUnknownMemberType]
    ema = None
    if config.ema is not None:
        ema = copy.deepcopy(model).eval().requires_grad_(False)
    return TrainingState(
        model=model,
        ema=ema,
        optimizer=build_optimizer(config.optimizer, model),
        objective_state={
            name: value.to(target)
            for name, value in build_objective(config.objective).init_state(num_classes).items()
        },
        step=0,
    )


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        group, _, name = full_name.partition(".")
        groups.setdefault(group, {})[name] = value
    return groups


def _load_module(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint's {what} does not fit the config's architecture: {error}"
        ) from error
