"""Frozen shallow layers, in every family."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from models.architectures import (
    AirbenchConfig,
    ConvNeXtConfig,
    EfficientNetConfig,
    EfficientNetV2Config,
    MobileNetV3Config,
    Normalization,
    ResNetConfig,
    SmallCnnConfig,
    VitConfig,
    WideResNetConfig,
    architecture_name,
    build_architecture,
    build_classifier,
    freeze_shallow,
)
from models.architectures.freezing import FrozenBatchNorm

_TRAINABLE: list[Any] = [
    SmallCnnConfig(width=4),
    WideResNetConfig(depth=10, width=1),
    WideResNetConfig(depth=10, width=1, norm="group"),
    ResNetConfig(name="resnet18"),
    EfficientNetConfig(name="b0"),
    MobileNetV3Config(name="small"),
    AirbenchConfig(widths=(4, 4, 4)),
]


@pytest.mark.parametrize("config", _TRAINABLE, ids=architecture_name)
def test_frozen_weights_and_statistics_stand_still_while_the_others_learn(config: Any) -> None:
    """Fails if only gradients are switched off, and if BatchNorm's eval mode ends with train()."""
    torch.manual_seed(0)
    model = build_classifier(config, 3, Normalization())
    names = list(model.state_dict())
    frozen = set(freeze_shallow(model, 0.5))
    assert list(model.state_dict()) == names
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        model.train()
        loss = nn.functional.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.arange(4) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = model.state_dict()
    moved = {name for name in names if not torch.equal(before[name], after[name])}
    owners = {name.rpartition(".")[0] for name in frozen}
    assert not {name for name in moved if name.rpartition(".")[0] in owners}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable <= moved
    statistics = {n.rpartition(".")[0] for n in moved if n.endswith("running_mean")}
    assert statistics == {
        name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)
    }


@pytest.mark.parametrize(
    ("config", "fraction", "last", "first_free"),
    [
        # 3 blocks: 1.5 of them is 1; the next stage's convolution stays free
        (SmallCnnConfig(width=2), 0.5, "features.7.", "features.8."),
        (WideResNetConfig(depth=16, width=1), 0.5, "blocks.2.", "blocks.3."),
        (ResNetConfig(name="resnet50"), 0.5, "layer3.0.", "layer3.1."),
        (EfficientNetConfig(name="b0"), 0.5, "features.4.2.", "features.5.0."),
        (EfficientNetV2Config(name="s"), 0.25, "features.3.3.", "features.4.0."),
        (ConvNeXtConfig(name="tiny"), 1 / 3, "features.3.2.", "features.4.0."),
        (VitConfig(name="b_16"), 0.25, "encoder_layer_2.", "encoder_layer_3."),
        (MobileNetV3Config(name="small"), 0.5, "features.5.", "features.6."),
        (AirbenchConfig(), 0.5, "groups.0.", "groups.1."),
    ],
    ids=lambda value: architecture_name(value) if hasattr(value, "kind") else "",
)
def test_the_stem_and_the_first_share_of_the_blocks_are_frozen(
    config: Any, fraction: float, last: str, first_free: str
) -> None:
    with torch.device("meta"):
        network = build_architecture(config, 10)
    frozen = freeze_shallow(network, fraction)
    names = [name for name, _ in network.named_parameters()]
    assert not any(p.requires_grad for n, p in network.named_parameters() if n in frozen)
    last_frozen = max(i for i, name in enumerate(names) if last in name)
    # All of them up to there, none after: the order of the data is the order of the names here.
    assert [name for name in names if name in frozen] == names[: last_frozen + 1]
    assert first_free in names[last_frozen + 1]


def test_small_shares_freeze_the_stem_and_none_freezes_nothing() -> None:
    def frozen(fraction: float) -> tuple[str, ...]:
        return freeze_shallow(build_architecture(WideResNetConfig(depth=10, width=1), 2), fraction)

    assert frozen(0.0) == ()
    assert frozen(0.1) == ("conv.weight",)


def test_a_share_of_one_leaves_what_follows_the_last_block() -> None:
    for config, free in [
        (WideResNetConfig(depth=10, width=1), {"bn", "fc"}),
        (EfficientNetConfig(name="b0"), {"features.8.0", "features.8.1", "classifier.1"}),
        (VitConfig(name="b_32", image_size=32), {"encoder.ln", "heads.head"}),
    ]:
        with torch.device("meta"):
            network = build_architecture(config, 2)
        freeze_shallow(network, 1.0)
        named = network.named_parameters()
        assert {name.rpartition(".")[0] for name, p in named if p.requires_grad} == free


def test_shares_are_rounded_down_without_the_error_of_binary_fractions() -> None:
    # 90 blocks: .7 * 90 is 62.999... in binary and must be 63, of which 30 + 30 in two stages.
    with torch.device("meta"):
        network = build_architecture(SmallCnnConfig(width=1, depth=30), 2)
    frozen = freeze_shallow(network, 0.7)
    last = frozen[-1].split(".")[1]
    # Stem 3 modules, a stage 4 and 30 blocks: the third block of the third stage is number
    # 3 + 2 * 34 + 4 + 2 = 77.
    assert last == "77"


def test_a_frozen_network_computes_what_it_did_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = build_classifier(ResNetConfig(name="resnet18"), 3, Normalization())
    model(torch.rand(8, 3, 32, 32))  # statistics that are not 0 and 1
    images = torch.rand(2, 3, 32, 32)
    model.eval()
    expected = model(images)
    freeze_shallow(model, 0.75)
    assert torch.equal(model(images), expected)


def test_frozen_norms_survive_copies_and_the_conversion_for_several_devices() -> None:
    model = build_classifier(WideResNetConfig(depth=10, width=1), 3, Normalization())
    freeze_shallow(model, 0.7)
    expected = [n for n, m in model.named_modules() if isinstance(m, FrozenBatchNorm)]
    assert expected == [f"backbone.blocks.{i}.bn{j}" for i in (0, 1) for j in (1, 2)]
    for other in (copy.deepcopy(model), nn.SyncBatchNorm.convert_sync_batchnorm(model)):
        assert [n for n, m in other.named_modules() if isinstance(m, FrozenBatchNorm)] == expected
        norm = other.train().get_submodule("backbone.blocks.0.bn1")
        norm(torch.randn(4, 16, 8, 8))
        assert norm.state_dict()["num_batches_tracked"] == 0


def test_freezing_twice_freezes_the_same() -> None:
    model = build_classifier(WideResNetConfig(depth=10, width=1), 3, Normalization())
    first = freeze_shallow(model, 0.5)
    assert freeze_shallow(model, 0.5) == first


def test_what_cannot_be_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 1\.5"):
        freeze_shallow(build_architecture(SmallCnnConfig(width=2), 2), 1.5)
    with pytest.raises(ValueError, match=r"Linear is no network of models\.architectures"):
        freeze_shallow(nn.Linear(2, 2), 0.5)
