"""Sizes, weight names, noise and configuration of the networks."""

from typing import Any

import pytest
import torch
import torchvision
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torchvision.ops import StochasticDepth

from models.architectures import (
    ArchitectureConfig,
    Classifier,
    EfficientNetConfig,
    Normalization,
    ResNetConfig,
    SmallCnnConfig,
    WideResNetConfig,
    architecture_name,
    build_architecture,
    build_classifier,
)
from models.architectures.efficientnet import published_dropout, published_image_size
from models.noise import StochasticDepthConfig
from models.noise.stochastic_depth import drop_rates

_SMALL: list[Any] = [
    SmallCnnConfig(width=4),
    WideResNetConfig(depth=10, width=1),
    ResNetConfig(name="resnet18"),
    EfficientNetConfig(name="b0"),
]


def _num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _branches(network: nn.Module) -> list[StochasticDepth]:
    return [m for m in network.modules() if isinstance(m, StochasticDepth)]


@pytest.mark.parametrize(
    ("name", "expected"),
    # Published: B0 5.29M, B7 66.3M (torchvision's tables), L2 480.31M (timm's results).
    [("b0", 5_288_548), ("b7", 66_347_960), ("l2", 480_309_308)],
)
def test_efficientnet_has_the_published_number_of_parameters(name: str, expected: int) -> None:
    with torch.device("meta"):
        network = build_architecture(EfficientNetConfig.model_validate({"name": name}), 1000)
    assert _num_parameters(network) == expected


def test_efficientnet_batch_norm_is_the_papers() -> None:
    with torch.device("meta"):
        network = build_architecture(EfficientNetConfig(), 10)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


def test_published_settings_of_efficientnets() -> None:
    assert [published_dropout(n) for n in ("b0", "b3", "b5", "l2")] == [0.2, 0.3, 0.4, 0.5]
    assert [published_image_size(n) for n in ("b0", "l2")] == [224, 800]
    with pytest.raises(ValueError, match="known: b0, b1"):
        published_dropout("b9")


def test_wide_resnet_28_2_has_1_47_million_parameters() -> None:
    assert _num_parameters(build_architecture(WideResNetConfig(), 10)) == 1_467_610


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_weight_names_are_torchvisions(name: str) -> None:
    with torch.device("meta"):
        ours = build_architecture(
            ResNetConfig.model_validate({"name": name}),
            1000,
            dropout=0.5,
            stochastic_depth=StochasticDepthConfig(),
        ).state_dict()
        theirs = getattr(torchvision.models, name)().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_computes_what_torchvision_computes(name: str) -> None:
    torch.manual_seed(0)
    ours = build_architecture(ResNetConfig.model_validate({"name": name}), 7).eval()
    theirs = getattr(torchvision.models, name)(num_classes=7).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize("config", _SMALL, ids=lambda c: c.kind)
def test_logits_have_a_row_per_image_and_a_column_per_class(config: Any) -> None:
    torch.manual_seed(0)
    network = build_architecture(config, 7).eval()
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_small_cnn_takes_images_of_8_pixels() -> None:
    assert build_architecture(SmallCnnConfig(width=2), 3)(torch.randn(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("config", _SMALL, ids=lambda c: c.kind)
def test_weights_depend_on_the_seed_and_not_on_the_noise(config: Any) -> None:
    torch.manual_seed(3)
    plain = build_architecture(config, 5).state_dict()
    torch.manual_seed(3)
    noised = build_architecture(
        config, 5, dropout=0.4, stochastic_depth=StochasticDepthConfig(rate=0.5)
    ).state_dict()
    torch.manual_seed(4)
    other = build_architecture(config, 5).state_dict()
    assert list(plain) == list(noised)
    assert all(torch.equal(plain[k], noised[k]) for k in plain)
    assert any(not torch.equal(plain[k], other[k]) for k in plain)


@pytest.mark.parametrize("config", _SMALL, ids=lambda c: c.kind)
def test_layer_noise_acts_while_training_only(config: Any) -> None:
    torch.manual_seed(0)
    network = build_architecture(
        config, 5, dropout=0.5, stochastic_depth=StochasticDepthConfig(rate=0.5)
    )
    images = torch.randn(4, 3, 32, 32)
    network.eval()
    assert torch.equal(network(images), network(images))
    network.train()
    assert not torch.equal(network(images), network(images))
    torch.manual_seed(9)
    first = network(images)
    torch.manual_seed(9)
    assert torch.equal(network(images), first)


def test_stochastic_depth_rates_of_16_blocks() -> None:
    official = drop_rates(StochasticDepthConfig(rate=0.2), 16)
    huang = drop_rates(StochasticDepthConfig(rate=0.2, rule="linear_huang"), 16)
    # official .2 * i / 16, i = 0..15; Huang i = 1..16
    assert official[0] == 0.0
    assert official[-1] == pytest.approx(0.1875)
    assert huang[0] == pytest.approx(0.0125)
    assert huang[-1] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("config", "num_blocks"),
    [
        (EfficientNetConfig(name="b0"), 16),
        (ResNetConfig(name="resnet50"), 16),
        (WideResNetConfig(), 12),
        (SmallCnnConfig(depth=2), 6),
    ],
)
def test_blocks_are_numbered_through_the_network(config: Any, num_blocks: int) -> None:
    with torch.device("meta"):
        network = build_architecture(
            config,
            10,
            stochastic_depth=StochasticDepthConfig(rate=0.2, rule="linear_huang"),
        )
    rates = [branch.p for branch in _branches(network)]
    assert rates == pytest.approx([0.2 * (i + 1) / num_blocks for i in range(num_blocks)])


def test_a_dropped_branch_survives_at_its_rate_and_keeps_its_mean() -> None:
    branch = StochasticDepth(0.2, "row").train()
    torch.manual_seed(1)
    out = branch(torch.ones(40_000, 1, 1, 1)).flatten()
    # survivors are 1/.8 = 1.25; P = .8, sigma of the share = sqrt(.16/40000) = .002
    assert set(out.tolist()) == {0.0, 1.25}
    assert abs(float((out > 0).float().mean()) - 0.8) < 5 * 0.002
    assert abs(float(out.mean()) - 1.0) < 5 * 0.002 * 1.25
    assert torch.equal(branch.eval()(torch.ones(3, 1)), torch.ones(3, 1))


def test_a_network_without_stochastic_depth_drops_nothing() -> None:
    assert {b.p for b in _branches(build_architecture(WideResNetConfig(depth=10), 3))} == {0.0}


def test_classifier_normalises_and_keeps_the_normalisation_out_of_its_weights() -> None:
    class Identity(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    normalization = Normalization(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    classifier = Classifier(Identity(), normalization)
    out = classifier(torch.ones(1, 3, 1, 1))
    # (1 - .5) / .5 = 1, (1 - .25) / .25 = 3, 1 / 2 = .5
    assert out.flatten().tolist() == [1.0, 3.0, 0.5]
    assert list(classifier.state_dict()) == []


def test_build_classifier_prefixes_the_networks_weights() -> None:
    config = SmallCnnConfig(width=2)
    classifier = build_classifier(config, 3, Normalization())
    network = build_architecture(config, 3)
    assert list(classifier.state_dict()) == [f"backbone.{k}" for k in network.state_dict()]


_ADAPTER: TypeAdapter[Any] = TypeAdapter(ArchitectureConfig)


@pytest.mark.parametrize("config", _SMALL, ids=lambda c: c.kind)
def test_configs_survive_json(config: Any) -> None:
    assert _ADAPTER.validate_json(_ADAPTER.dump_json(config)) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "vgg"}, "'small_cnn', 'wide_resnet', 'resnet', 'efficientnet'"),
        ({"kind": "resnet", "name": "resnet19"}, "'resnet18', 'resnet34'"),
        ({"kind": "efficientnet", "name": "b8"}, "'b7' or 'l2'"),
        ({"kind": "wide_resnet", "depth": 30}, "6n \\+ 4"),
        ({"kind": "small_cnn", "widht": 3}, "Extra inputs"),
    ],
)
def test_unknown_names_list_the_known_ones(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _ADAPTER.validate_python(fields)


def test_numbers_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        build_architecture(SmallCnnConfig(), 1)
    with pytest.raises(ValueError, match="dropout must lie in"):
        build_architecture(SmallCnnConfig(), 2, dropout=1.0)
    with pytest.raises(ValidationError, match="std must be > 0"):
        Normalization(std=(1.0, 0.0, 1.0))


def test_architecture_names_for_tables() -> None:
    assert [architecture_name(c) for c in _SMALL] == [
        "small_cnn-4x1",
        "wide_resnet-10-1",
        "resnet18",
        "efficientnet-b0",
    ]
