"""What a training carries from step to step, and its form in a checkpoint."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.architectures import Classifier, build_classifier
from models.objectives import auxiliary_head, build_objective
from models.optimization import build_optimizer
from models.scaling import build_scaler, load_scaler, scaler_tensors
from models.training_config import FinalWeights, TrainingConfig


@dataclass
class TrainingState:
    """Everything that an exact continuation needs beside the config, the seed and the data.

    The schedule, the noise and the position in the data are functions of `step`.

    Attributes:
        model: the weights that are trained.
        ema: their moving average, or None where the config has none.
        swa: their plain mean so far, or None where the config has none; it holds the first weights
            until the mean begins.
        optimizer: over `model`.
        objective_state: of the objective.
        step: updates made so far.
        scaler: the loss scale of fp16, else None.
        used_weights: which of the models is the result.
        fallbacks: what the config asked for and this machine could not do; for provenance.
    """

    model: Classifier
    ema: Classifier | None
    optimizer: torch.optim.Optimizer
    objective_state: dict[str, Tensor]
    step: int
    swa: Classifier | None = None
    scaler: torch.amp.GradScaler | None = None
    used_weights: FinalWeights = "last"
    fallbacks: list[str] = field(default_factory=list[str])

    @property
    def final_model(self) -> Classifier:
        """What is evaluated, saved and labels.

        A head that only training needs is left out.
        """
        models = {"last": self.model, "ema": self.ema, "swa": self.swa}
        model = models[self.used_weights]
        assert model is not None, "the config requires the average that it uses"
        return model.without_auxiliary_head()

    def tensors(self) -> dict[str, Tensor]:
        """CPU copies of all tensors.

        Their names: model.*, ema.*, swa.*, optimizer.<parameter>.*, objective.*, scaler.*.
        """
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
        for what, module in (("ema", self.ema), ("swa", self.swa)):
            saved = groups.pop(what, None)
            _refuse_other_parts(_PARTS[what], saved is not None, module is not None)
            if module is not None and saved is not None:
                _load_module(module, saved, what)
        scale = groups.pop("scaler", None)
        _refuse_other_parts(_PARTS["scaler"], scale is not None, self.scaler is not None)
        if self.scaler is not None and scale is not None:
            load_scaler(self.scaler, scale)
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
        for what, module in (("ema", self.ema), ("swa", self.swa)):
            if module is not None:
                for name, value in module.state_dict().items():
                    yield f"{what}.{name}", value
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:  # SGD without momentum keeps a None
                    yield f"optimizer.{name}.{key}", value
        for name, value in self.objective_state.items():
            yield f"objective.{name}", value
        if self.scaler is not None:
            for name, value in scaler_tensors(self.scaler).items():
                yield f"scaler.{name}", value

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
    config: TrainingConfig,
    num_classes: int,
    *,
    seed: int,
    device: torch.device | str,
    prepare: Callable[[Classifier], None] | None = None,
) -> TrainingState:
    """Fresh weights, the same on every device; torch's global generator is left as it was.

    Averages start as copies of the weights. Where the config leaves it open, convolutions' weights
    lie channels-last on CUDA.

    Args:
        config: of the training.
        num_classes: outputs of the network.
        seed: of the weights.
        device: where to train.
        prepare: called with the fresh classifier, on the CPU, before the average and the optimiser
            are made of it: loads other weights and freezes layers, in place.
    Raises: ValueError for a precision that the device does not have.
    """
    target = torch.device(device)
    scaler = build_scaler(config.precision, target)
    with torch.random.fork_rng([]):  # pyright: ignore[reportUnknownMemberType]
        torch.default_generator.manual_seed(seed)
        model = build_classifier(
            config.architecture,
            num_classes,
            config.normalization,
            dropout=config.noise.dropout,
            stochastic_depth=config.noise.stochastic_depth,
        )
        head = auxiliary_head(config.objective, config.unlabeled_ratio)
        if head is not None:  # drawn last, so that the other weights are the same without it
            model.add_auxiliary_head(head.hidden)
    if prepare is not None:
        prepare(model)
    model.to(target)
    is_channels_last = config.memory_format == "channels_last" or (
        config.memory_format == "auto" and target.type == "cuda"
    )
    if is_channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue, reportUnknownMemberType]

    def average() -> Classifier:
        return copy.deepcopy(model).eval().requires_grad_(False)

    return TrainingState(
        model=model,
        ema=None if config.ema is None else average(),
        optimizer=build_optimizer(config.optimizer, model),
        objective_state={
            name: value.to(target)
            for name, value in build_objective(config.objective).init_state(num_classes).items()
        },
        step=0,
        swa=None if config.swa is None else average(),
        scaler=scaler,
        used_weights=config.used_weights,
    )


_PARTS = {"ema": "a moving average", "swa": "a mean of weights", "scaler": "a loss scale"}


def _refuse_other_parts(what: str, is_saved: bool, is_configured: bool) -> None:
    if is_saved != is_configured:
        raise ValueError(
            f"checkpoint {'with' if is_saved else 'without'} {what} where the config has "
            f"{'one' if is_configured else 'none'}"
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
