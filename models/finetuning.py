"""A short training that follows another one: fine-tuning on labels and the resolution fix."""

from pydantic import BaseModel, ConfigDict, Field

from models.architectures import architecture_at
from models.durations import Duration
from models.noise import NoiseConfig
from models.objectives import JointConfig
from models.optimization import EmaConfig, OptimizerConfig, ScheduleConfig
from models.optimization.schedules import CosineConfig
from models.training_config import TrainingConfig


class FinetuneConfig(BaseModel):
    """A training that starts from the weights of the one before and reads labels alone.

    What is not here (network, normalisation, number format, ...) is that of the training before.
    Source of the resolution fix: Touvron et al. 2019 (FixRes); Xie et al. 2020.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    duration: Duration = Field(description="Length, counted from step 0 again.")
    optimizer: OptimizerConfig = Field(
        description="Its state is new; a tenth of the training's learning rate or less is usual."
    )
    schedule: ScheduleConfig = Field(default=CosineConfig(), description="Learning rate over time.")
    warmup: Duration | None = Field(
        default=None, description="Linear rise of the learning rate from 0; none by default."
    )
    batch_size: int = Field(ge=2, description="Labelled images a step over all devices.")
    image_size: int | None = Field(
        default=None,
        ge=8,
        le=2048,
        description="Side of the input in pixels, also of the resulting model; null: as before.",
    )
    crop_padding: int | None = Field(
        default=None, ge=0, description="Of the clean view; null: as before."
    )
    noise: NoiseConfig = Field(
        default=NoiseConfig(horizontal_flip=False),
        description="None by default: un-augmented images, neither dropout nor stochastic depth.",
    )
    label_smoothing: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the uniform distribution in the labels."
    )
    frozen_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the network's blocks, from the input, whose weights and BatchNorm"
        " statistics stand still, and the stem with them; 0 trains everything.",
    )
    ema: EmaConfig | None = Field(
        default=None, description="Moving average of the weights; null uses the last ones."
    )

    def training(self, before: TrainingConfig) -> TrainingConfig:
        """Return this as a training that follows `before`.

        Raises: ValueError (pydantic's ValidationError is one) where the two do not fit together.
        """
        views = {"image_size": self.image_size, "crop_padding": self.crop_padding}
        size = before.image_size if self.image_size is None else self.image_size
        own = {
            "architecture": architecture_at(before.architecture, size),
            "unlabeled_ratio": 0,
            "batch_size": self.batch_size,
            "duration": self.duration,
            "noise": self.noise,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "warmup": self.warmup,
            "ema": self.ema,
            "swa": None,
            "final_weights": None,
            "objective": JointConfig(label_smoothing=self.label_smoothing),
        }
        changed = {name: value for name, value in views.items() if value is not None} | own
        return TrainingConfig.model_validate(
            {name: getattr(before, name) for name in TrainingConfig.model_fields} | changed
        )
