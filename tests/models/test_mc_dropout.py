"""Monte-Carlo dropout: what is dropped, what is not touched, and what it depends on."""

import pytest
import torch
from torch import Tensor, nn

from models.architectures import (
    AirbenchConfig,
    ArchitectureConfig,
    ConvNeXtConfig,
    EfficientNetConfig,
    EfficientNetV2Config,
    MobileNetV3Config,
    ResNetConfig,
    SmallCnnConfig,
    VitConfig,
    WideResNetConfig,
    build_architecture,
)
from models.inference import InferenceNetwork, log_probabilities
from models.mc_dropout import dropout_passes


def ones_through_dropout(width: int = 1000) -> nn.Module:
    """A network whose outputs are its inputs, behind a dropout layer that is off."""
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Identity()).eval()


def passes(network: nn.Module, images: Tensor, *, seed: int = 0, rate: float = 0.25) -> Tensor:
    """(P, B, C) logits of three passes."""
    with torch.inference_mode(), dropout_passes(network, passes=3, rate=rate, seed=seed):
        return network(images).unflatten(0, (3, len(images)))


def test_each_pass_drops_its_own_share_and_scales_up_the_rest():
    found = passes(ones_through_dropout(), torch.ones(2, 1000))
    assert found.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    # 1,000 units of 1/4: mean 250, standard deviation 13.7; five of them are 68.
    dropped = (found == 0).sum(dim=2)
    assert ((dropped - 250).abs() < 68).all()
    assert len({tuple(row.tolist()) for row in found.flatten(0, 1)}) == 6


def test_passes_depend_on_the_seed_alone():
    network, images = ones_through_dropout(), torch.rand(2, 1000)
    first = passes(network, images)
    torch.manual_seed(1)
    assert torch.equal(passes(network, images), first)
    assert not torch.equal(passes(network, images, seed=1), first)


def test_the_global_generator_is_left_alone_and_the_network_as_it_was():
    network, images = ones_through_dropout(), torch.rand(2, 10)
    state = torch.get_rng_state()
    passes(network, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in network.modules())
    assert torch.equal(network(images), images)


def test_batch_norm_stays_in_evaluation_mode():
    # In training mode it would normalise by the batch, so that a row depended on the others, and
    # move its averages.
    norm = nn.BatchNorm1d(4)
    network = nn.Sequential(norm, nn.Dropout(0.5), nn.Linear(4, 2)).eval()
    images = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) * 10
    assert norm.running_mean is not None
    before = norm.running_mean.clone()
    together = passes(network, images)
    assert torch.equal(norm.running_mean, before)
    # With fresh averages BatchNorm changes nothing, up to its eps.
    plain = nn.Sequential(nn.Dropout(0.5), network[2]).eval()
    torch.testing.assert_close(passes(plain, images), together, rtol=1e-4, atol=1e-4)


def test_passes_differ_by_nothing_where_the_dropped_units_say_nothing():
    last = nn.Linear(8, 3)
    nn.init.zeros_(last.weight)
    network = nn.Sequential(nn.Dropout(0.5), last).eval()
    found = passes(network, torch.rand(2, 8))
    assert torch.equal(found.std(dim=0), torch.zeros(2, 3))


def test_predictions_in_evaluation_mode_go_through_the_passes():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(12, 3)).eval()
    images = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    ready = InferenceNetwork(network)
    with dropout_passes(ready, passes=5, rate=0.5, seed=3):
        log_probs, log_sums = log_probabilities(ready, images)
    assert log_probs.shape == (10, 3)
    assert log_sums.shape == (10,)
    assert log_probs.unflatten(0, (5, 2)).std(dim=0).min() > 0


def test_a_network_without_dropout_is_refused():
    with (
        pytest.raises(ValueError, match="Linear has none"),
        dropout_passes(nn.Linear(2, 2), passes=2, rate=0.5, seed=0),
    ):
        pass


@pytest.mark.parametrize(
    "config",
    [
        SmallCnnConfig(),
        WideResNetConfig(),
        AirbenchConfig(),
        ResNetConfig(name="resnet50"),
        EfficientNetConfig(name="b0"),
        EfficientNetV2Config(name="s"),
        ConvNeXtConfig(name="tiny"),
        VitConfig(name="b_16", image_size=32),
        MobileNetV3Config(name="small"),
    ],
    ids=lambda c: c.kind,
)
def test_every_architecture_ends_in_a_dropout_layer_whose_input_can_be_repeated(
    config: ArchitectureConfig,
):
    with torch.device("meta"):
        network = InferenceNetwork(build_architecture(config, 10))
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    # The features are computed once for each image: nothing but the head sees the repetitions.
    seen: list[int] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(
                lambda m, x: seen.append(x[0].shape[0] * (m is linear))
            )
    with dropout_passes(network, passes=3, rate=0.5, seed=0):
        logits = network(torch.empty(2, 3, 32, 32, device="meta"))
    assert logits.shape == (6, 10)
    assert seen[-1] == 6
    assert not any(seen[:-1])
