"""Everything that defines a training, save the data and the seed."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.architectures import (
    ArchitectureConfig,
    Interpolation,
    Normalization,
    check_architecture,
)
from models.durations import Duration
from models.noise import NoiseConfig, PadShiftConfig
from models.noise.manifold_mixup import ManifoldMixupConfig
from models.objectives import JointConfig, ObjectiveConfig, auxiliary_head, why_not_mixed
from models.optimization import EmaConfig, OptimizerConfig, ScheduleConfig, SwaConfig
from models.optimization.optimizers import AdamWConfig, SGDConfig
from models.optimization.schedules import CosineConfig, OneCycleConfig
from models.ranks import parts_of_step

Precision = Literal["fp32", "bf16", "fp16"]
FinalWeights = Literal["ema", "last", "swa"]
MemoryFormat = Literal["auto", "contiguous", "channels_last"]


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
    decode: Literal["full", "reduced"] = Field(
        default="full",
        description="reduced: JPEGs are decoded at 1/2, 1/4 or 1/8 of their sides where the view's"
        " part of the image is still at least image_size; faster, and slightly other pixels.",
        json_schema_extra={"absent_means": "full"},
    )
    batch_size: int = Field(
        ge=1,
        description="Labelled images a step over all devices. With the other images of the step "
        "there must be at least 2 for each micro-batch, which BatchNorm needs.",
    )
    accumulation_steps: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Equal micro-batches that a step is computed in, one forward and one backward "
        "pass each, with a single update. BatchNorm normalises within a micro-batch. Several "
        "processes share the micro-batches out, so their number must divide this one and does not "
        "change the result. With 1, each of several processes computes a part of its own: "
        "BatchNorm must then be synchronised (CUDA only), and layer noise depends on their number.",
        json_schema_extra={"absent_means": 1},
    )
    unlabeled_ratio: int = Field(
        default=3,
        ge=0,
        le=64,
        description="Pseudo-labelled (online: unlabelled) images for each labelled one; 0 trains "
        "on labels only.",
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
    swa: SwaConfig | None = Field(
        default=None,
        description="Plain mean of the weights along the end of the training; none by default.",
        json_schema_extra={"absent_means": None},
    )
    final_weights: FinalWeights | None = Field(
        default=None,
        description="Which weights are evaluated, saved and label: ema, swa, or the last ones. "
        "Null takes swa where it is set, else ema where it is set, else the last.",
        json_schema_extra={"absent_means": None},
    )
    objective: ObjectiveConfig = Field(
        default=JointConfig(), description="The loss, and what is read for it."
    )
    gradient_clip_norm: float | None = Field(
        default=None, gt=0, description="Largest global gradient norm; null does not clip."
    )
    precision: Precision = Field(
        default="fp32",
        description="bf16: autocast of the forward pass; weights, loss and average stay fp32. "
        "fp16: likewise, with a loss scale that adapts itself; on CUDA only.",
    )
    memory_format: MemoryFormat = Field(
        default="auto",
        description="Layout of the weights of convolutions. auto: channels_last on CUDA, "
        "contiguous elsewhere. On a CPU channels_last makes a step of WRN-28-2 a fifth shorter.",
        json_schema_extra={"absent_means": "auto"},
    )
    compile: bool = Field(
        default=False,
        description="torch.compile the network. Where that fails (on a CPU it needs a C++ "
        "compiler) training goes on without, with a warning.",
        json_schema_extra={"absent_means": False},
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
    checkpoints_kept: int = Field(
        default=2,
        ge=1,
        description="The newest that stay while training; all go once the model is committed. With "
        "2, one that a disk damaged costs one interval more.",
        json_schema_extra={"fingerprint": "excluded"},
    )

    @property
    def used_weights(self) -> FinalWeights:
        """Which weights are evaluated, saved and label."""
        if self.final_weights is not None:
            return self.final_weights
        if self.swa is not None:
            return "swa"
        return "last" if self.ema is None else "ema"

    @model_validator(mode="after")
    def _options_take_effect(self) -> Self:
        check_architecture(
            self.architecture,
            image_size=self.image_size,
            stochastic_depth=self.noise.stochastic_depth,
        )
        optimizer = self.optimizer
        if isinstance(optimizer, SGDConfig) and optimizer.nesterov and optimizer.momentum == 0:
            raise ValueError(
                "optimizer.nesterov=true needs optimizer.momentum > 0; momentum is 0: set "
                "nesterov: false"
            )
        self._refuse_unused_averages()
        self._refuse_what_cannot_be_compiled()
        if isinstance(self.schedule, OneCycleConfig) and self.warmup is not None:
            raise ValueError(
                f"warmup ({self.warmup}) beside schedule one_cycle, which rises by itself: remove "
                "warmup, and set schedule.rise_fraction"
            )
        num_parts, _ = parts_of_step(self)
        if self.batch_size * (1 + self.unlabeled_ratio) < 2 * num_parts:
            raise ValueError(
                "batch_size * (1 + unlabeled_ratio) / accumulation_steps is 1: BatchNorm needs at "
                "least 2 images a step and micro-batch"
            )
        mixing = self.noise.mixing
        reason = None if mixing is None else why_not_mixed(self.objective, mixing.kind)
        if mixing is not None and reason is not None:
            raise ValueError(
                f"noise.mixing.kind={mixing.kind} does not go with the objective: {reason}; leave "
                "one of them out"
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

    def _refuse_unused_averages(self) -> None:
        for name in ("ema", "swa"):
            if self.final_weights == name and getattr(self, name) is None:
                raise ValueError(f"final_weights={name} needs {name}: set it, or other weights")
        if self.swa is not None and self.used_weights != "swa":
            raise ValueError(
                f"swa has no effect with final_weights={self.final_weights}: set final_weights to "
                "swa, or remove swa"
            )

    def _refuse_what_cannot_be_compiled(self) -> None:
        mixing = self.noise.mixing
        if self.compile and isinstance(mixing, ManifoldMixupConfig):
            raise ValueError(
                "compile=true with noise.mixing.kind=manifold_mixup: a compiled network does not "
                "see that its hidden states are mixed; set compile: false, or take mixup"
            )
        if self.compile and auxiliary_head(self.objective, self.unlabeled_ratio) is not None:
            raise ValueError(
                "compile=true with an objective that adds a head to the network: a compiled "
                "network does not hand out the features for it; set compile: false"
            )
