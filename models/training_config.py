"""Everything that defines a training, save the data and the seed."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.architectures import ArchitectureConfig, Interpolation, Normalization
from models.durations import Duration
from models.noise import NoiseConfig, PadShiftConfig
from models.objectives import JointConfig, ObjectiveConfig
from models.optimization import EmaConfig, OptimizerConfig, ScheduleConfig
from models.optimization.optimizers import AdamWConfig, SGDConfig
from models.optimization.schedules import CosineConfig

Precision = Literal["fp32", "bf16"]


class TrainingConfig(BaseModel):
    """One training: architecture, views, noise, objective, optimiser and length."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: ArchitectureConfig = Field(description="The network.")
    image_size: int = Field(ge=8, le=2048, description="Side of the square input in pixels.")
    crop_padding: int = Field(
        default=0,
        ge=0,
        description="The clean view is the central square of side min(h, w) * image_size / "
        "(image_size + crop_padding); 0 takes the whole, 32 is ImageNet's habit.",
    )
    interpolation: Interpolation = Field(default="bilinear", description="Filter of the resize.")
    normalization: Normalization = Field(
        default=Normalization(), description="Mean and standard deviation of RGB in [0, 1]."
    )
    batch_size: int = Field(
        ge=1,
        description="Labelled images a step over all devices. BatchNorm needs at least 2 in all.",
    )
    unlabeled_ratio: int = Field(
        default=3,
        ge=0,
        le=64,
        description="Pseudo-labelled images for each labelled one; 0 trains on labels only.",
    )
    duration: Duration = Field(description="Length of the training.")
    noise: NoiseConfig = Field(default=NoiseConfig(), description="Input noise and layer noise.")
    optimizer: OptimizerConfig = Field(default=AdamWConfig(), description="How weights move.")
    schedule: ScheduleConfig = Field(default=CosineConfig(), description="Learning rate over time.")
    warmup: Duration | None = Field(
        default=None, description="Linear rise of the learning rate from 0; none by default."
    )
    ema: EmaConfig | None = Field(
        default=EmaConfig(), description="Moving average of the weights; null uses the last ones."
    )
    objective: ObjectiveConfig = Field(default=JointConfig(), description="The loss.")
    gradient_clip_norm: float | None = Field(
        default=None, gt=0, description="Largest global gradient norm; null does not clip."
    )
    precision: Precision = Field(
        default="fp32",
        description="bf16: autocast of the forward pass; weights, loss and average stay fp32.",
    )
    checkpoint_every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Null leaves it to checkpoint_every_seconds.",
        json_schema_extra={"fingerprint": "excluded"},
    )
    checkpoint_every_seconds: float | None = Field(
        default=300.0,
        gt=0,
        description="What a pre-emption may cost; null leaves it to checkpoint_every_steps.",
        json_schema_extra={"fingerprint": "excluded"},
    )

    @model_validator(mode="after")
    def _options_take_effect(self) -> Self:
        optimizer = self.optimizer
        if isinstance(optimizer, SGDConfig) and optimizer.nesterov and optimizer.momentum == 0:
            raise ValueError(
                "optimizer.nesterov=true needs optimizer.momentum > 0; momentum is 0: set "
                "nesterov: false"
            )
        if self.batch_size * (1 + self.unlabeled_ratio) < 2:
            raise ValueError(
                "batch_size * (1 + unlabeled_ratio) is 1: BatchNorm needs at least 2 images a step"
            )
        crop = self.noise.crop
        if isinstance(crop, PadShiftConfig) and crop.pixels >= self.image_size:
            raise ValueError(
                f"noise.crop.pixels={crop.pixels} must be below image_size={self.image_size}"
            )
        if self.warmup is not None and self.warmup.certainly_reaches(self.duration):
            raise ValueError(
                f"warmup ({self.warmup}) must be shorter than duration ({self.duration}): shorten"
                " warmup or lengthen duration"
            )
        return self
