"""A network made ready for inference predicts what it did before, faster and in 8-bit images."""

import copy
import logging

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.fx import GraphModule
from torchvision.models import VisionTransformer

from models.architectures import ArchitectureConfig, Normalization, build_classifier
from models.architectures.classifier import Classifier
from models.inference import InferenceNetwork, log_probabilities

ARCHITECTURES = [
    {"kind": "small_cnn", "width": 8, "depth": 1},
    {"kind": "wide_resnet", "depth": 10, "width": 1},
    {"kind": "airbench", "widths": [8, 16, 16]},
    {"kind": "resnet", "name": "resnet18"},
    {"kind": "mobilenet_v3", "name": "small"},
    {"kind": "efficientnet"},
    {"kind": "convnext"},
    {"kind": "vit"},
]
CONFIG = TypeAdapter(ArchitectureConfig)


def images(count=3, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return raw.permute(0, 3, 1, 2)


def trained(spec, num_classes=5):
    """A network whose running averages and affine parameters are not those it began with."""
    torch.manual_seed(0)
    if spec["kind"] == "vit":  # as torchvision's, but small
        tiny = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=num_classes)
        network = Classifier(tiny, Normalization()).eval()
    else:
        config = CONFIG.validate_python(spec)
        network = build_classifier(config, num_classes, Normalization()).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.8, 1.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(last.weight, std=0.3)
    return network


@pytest.fixture(params=ARCHITECTURES, ids=lambda spec: spec["kind"])
def spec(request):
    return request.param


def test_the_fused_network_gives_the_logits_of_the_unfused_one(spec):
    network, raw = trained(spec), images()
    with torch.inference_mode():
        expected = network(raw.float() / 255)
        found = InferenceNetwork(network)(raw)
    assert float(expected.std()) > 0.01  # there is something to compare
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-4)


def test_bf16_is_close_and_given_in_float32(spec):
    network, raw = trained(spec), images()
    with torch.inference_mode():
        exact = InferenceNetwork(network)(raw)
        rough = InferenceNetwork(network, "bf16")(raw)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert float((rough - exact).abs().mean()) < 0.05 * float(exact.abs().mean()) + 0.02


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        ({"kind": "resnet", "name": "resnet18"}, 0),
        ({"kind": "mobilenet_v3", "name": "small"}, 0),
        ({"kind": "wide_resnet", "depth": 10, "width": 1}, 4),  # those before a convolution
        ({"kind": "airbench", "widths": [8, 16, 16]}, 3),  # those behind a pooling
    ],
)
def test_every_batch_norm_right_behind_a_convolution_is_gone(spec, left):
    ready = InferenceNetwork(trained(spec))
    norms = [module for module in ready.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == left
    assert ready.is_scaled_inside


def test_batch_norms_that_stay_keep_their_float32_averages():
    ready = InferenceNetwork(trained({"kind": "airbench", "widths": [8, 16, 16]}), "bf16")
    norms = [module for module in ready.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.running_mean.dtype for norm in norms} == {torch.float32}  # type: ignore[union-attr]
    assert ready.network.fc.weight.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_the_original_network_is_left_as_it_was():
    network = trained({"kind": "small_cnn", "width": 8, "depth": 1}).train()
    before = copy.deepcopy(network.state_dict())
    ready = InferenceNetwork(network, "bf16")
    with torch.inference_mode():
        first, second = ready(images()), ready(images())
    assert torch.equal(first, second)
    assert network.training
    assert not ready.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_zero_padding_stays_the_mean_colour_at_the_borders():
    # One 3 x 3 sum of the normalised image: 0 inside, and at the borders too, where the padding
    # is 0 as well. Known-broken variant: the mean folded into the convolution's bias.
    backbone = nn.Sequential(nn.Conv2d(3, 1, 3, padding=1, bias=False), nn.Flatten())
    nn.init.ones_(backbone[0].weight)  # type: ignore[arg-type]
    mean = (0.2, 0.4, 0.6)  # 51, 102, 153 of 255
    network = Classifier(backbone, Normalization(mean=mean, std=(0.1, 0.2, 0.3))).eval()
    pixels = torch.tensor([51, 102, 153], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    ready = InferenceNetwork(network)
    assert ready.is_scaled_inside
    with torch.inference_mode():
        torch.testing.assert_close(ready(pixels), torch.zeros(1, 16), rtol=0, atol=1e-4)


class DependsOnValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        x = x.mean((2, 3))
        return self.linear(x if x.sum() > 0 else -x)


def test_a_network_that_cannot_be_traced_is_used_as_it_is(caplog):
    network = DependsOnValues().eval()
    with caplog.at_level(logging.DEBUG, "models.fusing"):
        ready = InferenceNetwork(network)
    assert not isinstance(ready.network, GraphModule)
    assert "DependsOnValues is not fused: it cannot be traced" in caplog.text
    raw = images()
    with torch.inference_mode():
        torch.testing.assert_close(ready(raw), network(raw.float() / 255))


def test_a_dropout_layer_is_still_there_for_those_who_switch_it_on():
    torch.manual_seed(0)
    config = CONFIG.validate_python({"kind": "small_cnn", "width": 8, "depth": 1})
    network = build_classifier(config, 3, Normalization()).eval()
    ready = InferenceNetwork(network)
    assert [module for module in ready.modules() if isinstance(module, nn.Dropout)]


def test_nan_and_infinite_logits_are_refused_with_the_row():
    class Broken(nn.Module):
        def forward(self, x):
            logits = x.mean((2, 3))
            return logits / (logits - logits[2])  # row 2: 0 / 0

    with pytest.raises(ValueError, match=r"logits of 1 of 4 images are not finite \(first: row 2"):
        log_probabilities(InferenceNetwork(Broken()), images(4))
