"""Sizes, weight names, noise and configuration of the networks."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torchvision
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torchvision.ops import StochasticDepth

from models.architectures import (
    AirbenchConfig,
    ArchitectureConfig,
    Classifier,
    ConvNeXtConfig,
    EfficientNetConfig,
    EfficientNetV2Config,
    MobileNetV3Config,
    Normalization,
    ResNetConfig,
    SmallCnnConfig,
    VitConfig,
    WideResNetConfig,
    architecture_at,
    architecture_name,
    build_architecture,
    build_classifier,
    check_architecture,
    torchvision_name,
)
from models.architectures.efficientnet import published_dropout, published_image_size
from models.architectures.vision_transformer import VitBlock, interpolated_position_embedding
from models.durations import Duration
from models.noise import NoiseConfig, StochasticDepthConfig
from models.noise.stochastic_depth import drop_rates
from models.training_config import TrainingConfig

_SMALL: list[Any] = [
    SmallCnnConfig(width=4),
    WideResNetConfig(depth=10, width=1),
    ResNetConfig(name="resnet18"),
    EfficientNetConfig(name="b0"),
    WideResNetConfig(depth=10, width=1, norm="group"),
    MobileNetV3Config(name="small"),
]
_LARGE: list[Any] = [
    EfficientNetV2Config(name="s"),
    ConvNeXtConfig(name="tiny"),
    VitConfig(name="b_16", image_size=32),
]


def _num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _stirred(network: nn.Module) -> dict[str, torch.Tensor]:
    """Random values for all weights and statistics, so that no zero hides a difference."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.rand(tensor.shape, generator=generator) * 0.05 + (name.endswith("var") * 0.5)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in network.state_dict().items()
    }


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


@pytest.mark.parametrize(
    ("width", "num_classes", "expected"),
    # Published: WRN-28-10 36.5M (Zagoruyko and Komodakis 2016, table 4), WRN-28-8 23.4M (TorchSSL).
    [(8, 100, 23_401_012), (10, 10, 36_479_194)],
)
def test_wider_wide_resnets_have_the_published_number_of_parameters(
    width: int, num_classes: int, expected: int
) -> None:
    with torch.device("meta"):
        network = build_architecture(WideResNetConfig(width=width), num_classes)
    assert _num_parameters(network) == expected


def test_group_norm_lets_no_image_see_another_and_has_the_same_weights() -> None:
    # With BatchNorm (norm ignored) an image's logits change with its neighbours.
    torch.manual_seed(0)
    network = build_architecture(WideResNetConfig(depth=10, width=1, norm="group"), 4).train()
    images = torch.randn(6, 3, 16, 16)
    assert torch.allclose(network(images)[:2], network(images[:2]), atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    batch = build_architecture(WideResNetConfig(depth=10, width=1), 4)
    assert not torch.allclose(batch(images)[:2], batch(images[:2]), atol=1e-5)
    assert _num_parameters(network) == _num_parameters(batch)


def test_group_norm_refuses_a_momentum_that_nothing_reads() -> None:
    with pytest.raises(ValidationError, match=r"batch_norm_momentum=0.001 has no effect"):
        WideResNetConfig(norm="group", batch_norm_momentum=0.001)


@pytest.mark.parametrize(
    ("config", "expected"),
    # The numbers of torchvision's model tables, 1000 classes.
    [
        (EfficientNetV2Config(name="s"), 21_458_488),
        (EfficientNetV2Config(name="m"), 54_139_356),
        (EfficientNetV2Config(name="l"), 118_515_272),
        (ConvNeXtConfig(name="tiny"), 28_589_128),
        (ConvNeXtConfig(name="small"), 50_223_688),
        (ConvNeXtConfig(name="base"), 88_591_464),
        (ConvNeXtConfig(name="large"), 197_767_336),
        (VitConfig(name="b_16"), 86_567_656),
        (VitConfig(name="b_32"), 88_224_232),
        (VitConfig(name="l_16"), 304_326_632),
        (VitConfig(name="l_32"), 306_535_400),
        (VitConfig(name="h_14", image_size=518), 633_470_440),
        (MobileNetV3Config(name="small"), 2_542_856),
        (MobileNetV3Config(name="large"), 5_483_032),
    ],
    ids=lambda value: architecture_name(value) if hasattr(value, "kind") else "",
)
def test_torchvisions_families_have_its_weights(config: Any, expected: int) -> None:
    size = {"image_size": config.image_size} if isinstance(config, VitConfig) else {}
    with torch.device("meta"):
        ours = build_architecture(
            config, 1000, dropout=0.5, stochastic_depth=StochasticDepthConfig()
        )
        theirs = torchvision.models.get_model(str(torchvision_name(config)), **size).state_dict()
    assert _num_parameters(ours) == expected
    # In the same order, too, so that optimiser states and checksums do not depend on ours.
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.items()
    ]


@pytest.mark.parametrize(
    "config",
    [
        *_LARGE,
        MobileNetV3Config(name="small"),
        MobileNetV3Config(name="large"),
        EfficientNetConfig(name="b0", batch_norm_eps=1e-5),
    ],
    ids=architecture_name,
)
def test_torchvisions_families_compute_what_torchvision_computes(config: Any) -> None:
    """Fails if a block adds its branches otherwise, or if a norm has another epsilon."""
    size = {"image_size": 32} if isinstance(config, VitConfig) else {}
    with torch.device("meta"):
        ours = build_architecture(config, 5, dropout=0.5)
        theirs = torchvision.models.get_model(str(torchvision_name(config)), num_classes=5, **size)
    weights = _stirred(ours.to_empty(device="cpu"))
    ours.load_state_dict(weights)
    theirs.to_empty(device="cpu").load_state_dict(weights)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.eval()(images)
        assert torch.allclose(ours.eval()(images), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("config", [*_LARGE, MobileNetV3Config()], ids=architecture_name)
def test_each_layer_noise_acts_alone_and_moves_no_weight(config: Any) -> None:
    torch.manual_seed(3)
    network = build_architecture(config, 5, stochastic_depth=StochasticDepthConfig(rate=0.9))
    torch.manual_seed(3)
    plain = build_architecture(config, 5).state_dict()
    assert all(torch.equal(plain[k], v) for k, v in network.state_dict().items())
    network.load_state_dict(_stirred(network))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        clean = network.eval()(images)
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert not torch.allclose(network(images), clean)
        for branch in _branches(network):
            branch.p = 0.0
        assert torch.allclose(network(images), clean, rtol=1e-4, atol=1e-5)
        noisy = build_architecture(config, 5, dropout=0.5).train()
        noisy.load_state_dict(network.state_dict())
        for module in noisy.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert not torch.allclose(noisy(images), clean)


def test_both_branches_of_a_transformer_block_can_be_dropped() -> None:
    with torch.device("meta"):
        network = build_architecture(VitConfig(name="b_32", image_size=32), 2)
    block = next(m for m in network.modules() if isinstance(m, VitBlock)).to_empty(device="cpu")
    block.load_state_dict(_stirred(block))
    block.stochastic_depth.p = 1.0
    tokens = torch.randn(2, 3, 768)
    assert torch.equal(block.train()(tokens), tokens)
    assert not torch.allclose(block.eval()(tokens), tokens)


def test_position_embeddings_are_interpolated_over_the_grid_and_not_over_the_row() -> None:
    # A plane 10 y + x over 2x2 patches stays a plane over 3x3, corners where they were: bicubic
    # weights at the middle of two samples, the outer ones repeated, are -3/32, 19/32, 19/32, -3/32,
    # so the middle of 0 and 1 is (19 - 3) / 32 = 1/2.
    token = torch.full((1, 1, 1), -7.0)
    plane = torch.tensor([0.0, 1.0, 10.0, 11.0]).view(1, 4, 1)
    resized = interpolated_position_embedding(torch.cat([token, plane], 1), 9)
    expected = [-7.0, 0.0, 0.5, 1.0, 5.0, 5.5, 6.0, 10.0, 10.5, 11.0]
    assert resized.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="square grids"):
        interpolated_position_embedding(torch.zeros(1, 6, 1), 9)


def test_position_embeddings_agree_with_torchvisions() -> None:
    embedding = torch.randn(1, 17, 6, generator=torch.Generator().manual_seed(0))
    theirs = torchvision.models.vision_transformer.interpolate_embeddings(
        96, 16, OrderedDict({"encoder.pos_embedding": embedding})
    )["encoder.pos_embedding"]
    assert torch.equal(interpolated_position_embedding(embedding, 36), theirs)


def test_a_transformer_is_made_for_one_image_size() -> None:
    with pytest.raises(ValidationError, match=r"must be a multiple .* 16 pixels: take 224"):
        VitConfig(image_size=230)
    with pytest.raises(ValueError, match=r"image_size=224 of vit must equal image_size=256"):
        check_architecture(VitConfig(), image_size=256)
    assert architecture_at(VitConfig(name="l_32"), 384) == VitConfig(name="l_32", image_size=384)
    assert architecture_at(ResNetConfig(), 384) == ResNetConfig()
    with pytest.raises(ValueError, match="convnext needs images of at least 32 pixels"):
        architecture_at(ConvNeXtConfig(), 16)


def test_a_training_refuses_what_its_architecture_cannot_take() -> None:
    def training(architecture: Any, **noise: Any) -> TrainingConfig:
        return TrainingConfig(
            architecture=architecture,
            image_size=256,
            batch_size=4,
            duration=Duration(steps=10),
            noise=NoiseConfig(**noise),
        )

    assert training(AirbenchConfig()).image_size == 256
    with pytest.raises(ValidationError, match="image_size=224 of vit must equal image_size=256"):
        training(VitConfig())
    with pytest.raises(ValidationError, match="stochastic_depth has no effect with airbench"):
        training(AirbenchConfig(), stochastic_depth=StochasticDepthConfig())


@pytest.mark.parametrize(
    ("config", "size"),
    [(AirbenchConfig(widths=(4, 4, 4)), 9), (ConvNeXtConfig(), 32), (MobileNetV3Config(), 8)],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_the_smallest_image_that_is_allowed_gives_logits(config: Any, size: int) -> None:
    check_architecture(config, image_size=size)
    torch.manual_seed(0)
    network = build_architecture(config, 2).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 3, size, size)).shape == (2, 2)


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


@pytest.mark.parametrize("config", _SMALL, ids=architecture_name)
def test_logits_have_a_row_per_image_and_a_column_per_class(config: Any) -> None:
    torch.manual_seed(0)
    network = build_architecture(config, 7).eval()
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_small_cnn_takes_images_of_8_pixels() -> None:
    assert build_architecture(SmallCnnConfig(width=2), 3)(torch.randn(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("config", _SMALL, ids=architecture_name)
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


@pytest.mark.parametrize("config", _SMALL, ids=architecture_name)
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
        (EfficientNetV2Config(name="s"), 40),
        (ConvNeXtConfig(name="tiny"), 18),
        (VitConfig(name="b_16"), 12),  # 24 if each residual branch had a number of its own
        (MobileNetV3Config(name="large"), 15),
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


@pytest.mark.parametrize("config", _SMALL, ids=architecture_name)
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
        "wide_resnet-10-1-group",
        "mobilenet_v3-small",
    ]
    assert [architecture_name(c) for c in [*_LARGE, AirbenchConfig()]] == [
        "efficientnet_v2-s",
        "convnext-tiny",
        "vit-b_16",
        "airbench-64-256-256",
    ]


def test_networks_that_torchvision_has_weights_for_are_named_as_there() -> None:
    known = set(torchvision.models.list_models())
    assert {torchvision_name(c) for c in _LARGE} <= known
    assert torchvision_name(EfficientNetConfig(name="b7")) == "efficientnet_b7"
    nowhere = [EfficientNetConfig(name="l2"), SmallCnnConfig(), WideResNetConfig()]
    assert [torchvision_name(c) for c in nowhere] == [None, None, None]
