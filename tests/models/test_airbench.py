"""The fast network for images of 32 pixels."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from models.architectures import AirbenchConfig, build_architecture, check_architecture
from models.architectures.airbench import (
    Airbench,
    AirbenchGroup,
    natural_patch_moments,
    whitening_filters,
)
from models.noise import StochasticDepthConfig


def _network(**fields: object) -> Airbench:
    torch.manual_seed(0)
    network = build_architecture(AirbenchConfig.model_validate(fields), 10)
    assert isinstance(network, Airbench)
    return network


@pytest.mark.parametrize(
    ("widths", "expected"),
    # whitening 24*12 + 24; a group of i to o channels 9*i*o + 9*o*o + 4*o; head 10*o.
    # 64, 256, 256: 312 + 50,944 + 738,304 + 1,180,672 + 2,560; published: 1.97M.
    [((64, 256, 256), 1_972_792), ((32, 128, 256), 1_089_720)],
)
def test_number_of_parameters(widths: tuple[int, int, int], expected: int) -> None:
    network = _network(widths=widths)
    assert sum(p.numel() for p in network.parameters()) == expected


def test_whitening_filters_match_a_case_worked_by_hand() -> None:
    # Uncorrelated pixels of second moments 12, 11, ..., 1: the eigenvectors are the axes, by
    # falling eigenvalue, so filter k looks at pixel k alone, with weight 1 / sqrt(12 - k + .0005):
    # .288669 for the first, .999750 for the last. Dividing by the eigenvalue itself (.083330)
    # would fail, and so would eigenvectors in rows or in rising order.
    moments = torch.diag(torch.arange(12.0, 0.0, -1.0))
    filters = whitening_filters(moments).flatten(1)
    assert filters.shape == (24, 12)
    assert torch.equal(filters != 0, torch.cat([torch.eye(12), torch.eye(12)]) != 0)
    assert float(filters[0, 0]) == pytest.approx(0.288669, abs=1e-6)
    assert float(filters[11, 11]) == pytest.approx(0.999750, abs=1e-6)
    assert torch.equal(filters[12:], -filters[:12])


def test_natural_patches_come_out_uncorrelated() -> None:
    moments = natural_patch_moments()
    assert torch.equal(moments, moments.T)
    values = torch.linalg.eigvalsh(moments)
    # Of CIFAR-10's patches 10.04 of 11.8 lies in the mean brightness; all are positive, or the
    # moments would be no moments.
    assert float(values[-1]) == pytest.approx(10.038, abs=1e-3)
    assert float(values[0]) > 1e-4
    filters = whitening_filters(moments).double().flatten(1)[:12]
    out = filters @ moments @ filters.T
    # variance e / (e + .0005) of each output, none between two
    expected = torch.diag((values / (values + 5e-4)).flip(0))
    assert torch.allclose(out, expected, atol=1e-5)


def test_filters_do_not_depend_on_the_signs_that_the_eigensolver_chose(monkeypatch) -> None:
    before = whitening_filters(natural_patch_moments())
    solver = torch.linalg.eigh

    def other_signs(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = solver(matrix)
        return values, vectors * torch.tensor([1.0, -1.0]).repeat(6)

    monkeypatch.setattr(torch.linalg, "eigh", other_signs)
    assert torch.equal(whitening_filters(natural_patch_moments()), before)


def test_whitening_is_frozen_and_learned_filters_are_not() -> None:
    frozen, learned = _network(), _network(whitening="learned")
    assert not frozen.whiten.weight.requires_grad
    assert torch.equal(frozen.whiten.weight, whitening_filters(natural_patch_moments()))
    assert frozen.whiten.bias is not None
    assert frozen.whiten.bias.requires_grad
    assert learned.whiten.weight.requires_grad
    assert not torch.equal(learned.whiten.weight[12:], -learned.whiten.weight[:12])


def test_convolutions_start_as_the_identity_and_scales_stay_at_one() -> None:
    group = AirbenchGroup(3, 8, 0.4)
    images = torch.randn(2, 3, 6, 6)
    assert torch.allclose(group.conv1(images)[:, :3], images, atol=1e-6)
    norms = [m for m in _network().modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for m in norms} == {0.4}
    assert not any(m.weight.requires_grad for m in norms)
    assert all(m.bias.requires_grad for m in norms)


def test_logits_are_a_ninth_of_the_linear_layers() -> None:
    network = _network(widths=(4, 4, 4)).eval()
    images = torch.randn(2, 3, 32, 32)
    logits = network(images)
    network.fc.weight.data *= 9
    assert torch.allclose(network(images), logits * 9)
    features = network.groups(nn.functional.gelu(network.whiten(images))).amax((2, 3))
    assert torch.allclose(logits * 81, features @ network.fc.weight.T, atol=1e-5)


def test_it_learns_in_a_few_steps() -> None:
    # Two classes that differ by where the light comes from.
    network = _network(widths=(8, 8, 8)).train()
    labels = torch.arange(32) % 2
    ramp = torch.linspace(-1, 1, 32)
    images = torch.where((labels == 0).view(-1, 1, 1, 1), ramp, -ramp).expand(32, 3, 32, 32)
    images = images + 0.1 * torch.randn(32, 3, 32, 32)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 5.0)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_stochastic_depth_is_refused_for_want_of_residual_branches() -> None:
    noise = StochasticDepthConfig()
    with pytest.raises(ValueError, match="stochastic_depth has no effect with airbench"):
        check_architecture(AirbenchConfig(), image_size=32, stochastic_depth=noise)
    with pytest.raises(ValueError, match="no effect with airbench"):
        build_architecture(AirbenchConfig(), 10, stochastic_depth=noise)


def test_sizes_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="airbench needs images of at least 9 pixels"):
        check_architecture(AirbenchConfig(), image_size=8)
    with pytest.raises(ValidationError, match="widths must lie in 1 to 4096"):
        AirbenchConfig(widths=(0, 1, 1))


def test_weights_can_be_drawn_without_memory() -> None:
    with torch.device("meta"):
        assert build_architecture(AirbenchConfig(), 10).state_dict()["whiten.weight"].is_meta
