"""A stage after a training: what it takes from the training before, and what is its own."""

import pytest
from pydantic import ValidationError

from models.architectures import SmallCnnConfig, VitConfig
from models.durations import Duration
from models.finetuning import FinetuneConfig
from models.noise import CutoutConfig, NoiseConfig
from models.objectives import FixMatchConfig, JointConfig
from models.optimization import EmaConfig, SGDConfig, SwaConfig
from models.optimization.schedules import ConstantConfig, CosineConfig
from models.training import TrainingConfig

BEFORE = TrainingConfig(
    architecture=SmallCnnConfig(width=4, depth=1),
    image_size=16,
    crop_padding=2,
    interpolation="bicubic",
    batch_size=8,
    accumulation_steps=2,
    unlabeled_ratio=3,
    duration=Duration(steps=100),
    noise=NoiseConfig(cutout=CutoutConfig(fraction=0.5), dropout=0.5),
    schedule=ConstantConfig(),
    warmup=Duration(steps=10),
    ema=EmaConfig(decay=0.5),
    swa=SwaConfig(),
    objective=FixMatchConfig(),
    gradient_clip_norm=1.0,
    precision="bf16",
    checkpoint_every_steps=7,
)
FINETUNE = FinetuneConfig(
    duration=Duration(labeled_epochs=1.5), optimizer=SGDConfig(lr=0.001), batch_size=6
)


def test_a_stage_on_labels_keeps_the_network_and_drops_noise_and_pseudo_labels():
    after = FINETUNE.training(BEFORE)

    kept = {"architecture", "image_size", "crop_padding", "interpolation", "normalization"}
    kept |= {"accumulation_steps", "gradient_clip_norm", "precision", "checkpoint_every_steps"}
    assert {n: getattr(after, n) for n in kept} == {n: getattr(BEFORE, n) for n in kept}
    assert after.unlabeled_ratio == 0
    assert after.batch_size == 6
    assert after.duration == Duration(labeled_epochs=1.5)
    # Un-augmented: a stage that took over its training's noise would have cutout and dropout here.
    assert after.noise == NoiseConfig(horizontal_flip=False)
    assert after.optimizer == SGDConfig(lr=0.001)
    assert after.schedule == CosineConfig()
    assert after.warmup is None
    assert after.ema is None
    assert after.swa is None
    assert after.used_weights == "last"
    assert after.objective == JointConfig(label_smoothing=0.1)


def test_a_resolution_fix_changes_the_view_and_what_is_made_for_its_size():
    fix = FINETUNE.model_copy(update={"image_size": 32, "crop_padding": 0})
    assert (fix.training(BEFORE).image_size, fix.training(BEFORE).crop_padding) == (32, 0)

    vit = BEFORE.model_copy(update={"architecture": VitConfig(image_size=16)})
    assert fix.training(vit).architecture == VitConfig(image_size=32)


def test_a_stage_that_does_not_fit_its_training_is_refused():
    with pytest.raises(ValidationError, match="accumulation_steps=4"):
        FINETUNE.training(BEFORE.model_copy(update={"accumulation_steps": 4}))
    vit = BEFORE.model_copy(update={"architecture": VitConfig(image_size=16)})
    odd = FINETUNE.model_copy(update={"image_size": 33})
    with pytest.raises(ValueError, match=r"vit.image_size=33 must be a multiple"):
        odd.training(vit)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_network_frozen_whole_would_learn_nothing_and_is_refused(fraction):
    with pytest.raises(ValidationError, match="frozen_fraction"):
        FinetuneConfig.model_validate(FINETUNE.model_dump() | {"frozen_fraction": fraction})
