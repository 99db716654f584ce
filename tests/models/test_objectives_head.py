"""The head that pseudo-labels have to themselves: gradients, checkpoints, export, processes."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from models.architectures import (
    ArchitectureConfig,
    Normalization,
    ResNetConfig,
    SmallCnnConfig,
    WideResNetConfig,
    build_classifier,
)
from models.description import weights_to_bytes
from models.durations import Duration
from models.noise import NoiseConfig
from models.objectives import (
    Batch,
    DecoupledHeadConfig,
    JointConfig,
    JointObjective,
    Models,
    auxiliary_head,
)
from models.training import TrainingConfig, TrainingState, initial_state, train

STEPS = 6


HEAD = DecoupledHeadConfig()


def config(head: DecoupledHeadConfig | None = HEAD, **changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "architecture": SmallCnnConfig(width=4),
        "image_size": 8,
        "batch_size": 4,
        "unlabeled_ratio": 1,
        "duration": Duration(steps=STEPS),
        "noise": NoiseConfig(dropout=0.3),
        "objective": JointConfig(decoupled_head=head),
    }
    return TrainingConfig(**(settings | changes))


def next_batch(step: int, part: int = 0, num_parts: int = 1) -> Batch:
    assert num_parts == 1
    generator = torch.Generator().manual_seed(step)
    soft = torch.rand((4, 3), generator=generator)
    return Batch(
        torch.rand((8, 3, 8, 8), generator=generator),
        torch.randint(3, (4,), generator=generator),
        soft / soft.sum(dim=1, keepdim=True),
    )


def fresh(cfg: TrainingConfig, seed: int = 1) -> TrainingState:
    return initial_state(cfg, 3, seed=seed, device="cpu")


def run(state: TrainingState, cfg: TrainingConfig, until: int = STEPS, **options: Any) -> None:
    for report in train(
        state, cfg, next_batch, total_steps=STEPS, num_labeled=40, layer_seed=1, **options
    ):
        if report.step == until:
            break


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradients(unlabeled_weight: float, pseudo: Tensor) -> dict[str, Tensor]:
    """Gradients of the weights by name, in evaluation mode so that only the loss differs."""
    model = fresh(config()).model.eval()
    batch = next_batch(0)
    batch = Batch(batch.images, batch.labels, pseudo)
    objective = JointObjective(
        JointConfig(decoupled_head=DecoupledHeadConfig(), unlabeled_weight=unlabeled_weight)
    )
    objective.loss(Models(model), batch, {}, 0, 1).loss.backward()
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def test_pseudo_labels_move_their_head_and_the_features_but_not_the_main_head():
    one, other = (torch.eye(3)[[k] * 4] for k in (0, 2))
    before, after = gradients(1.0, one), gradients(1.0, other)
    for name in ("backbone.fc.weight", "backbone.fc.bias"):  # the joint head would differ here
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=0)
    assert not torch.equal(before["auxiliary_head.2.bias"], after["auxiliary_head.2.bias"])
    assert not torch.equal(
        before["backbone.features.0.weight"], after["backbone.features.0.weight"]
    )


def test_labels_do_not_move_the_head_of_the_pseudo_labels():
    found = gradients(0.0, torch.eye(3)[[0] * 4])
    assert found["auxiliary_head.2.weight"].abs().max().item() == 0.0
    assert found["backbone.fc.weight"].abs().max().item() > 0.0


@pytest.mark.parametrize(
    "architecture",
    [
        SmallCnnConfig(width=4),
        WideResNetConfig(depth=10, width=1),
        ResNetConfig(name="resnet18"),
    ],
)
def test_main_logits_are_the_plain_ones_and_the_head_reads_the_same_features(
    architecture: ArchitectureConfig,
):
    model = build_classifier(architecture, 5, Normalization()).eval()
    model.add_auxiliary_head(hidden=7)
    head = cast("Any", model.auxiliary_head)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        both = model(images, with_auxiliary_head=True)
        assert both.shape == (2, 2, 5)
        assert torch.equal(both[0], model(images))
        # with the main layer's weights in both of its layers it gives the main logits
        main = [m for m in model.backbone.modules() if isinstance(m, torch.nn.Linear)][-1]
        assert head[0].in_features == main.in_features
        assert head[0].out_features == 7
        head[0], head[1], head[2] = main, torch.nn.Identity(), torch.nn.Identity()
        both = model(images, with_auxiliary_head=True)
        assert torch.equal(both[1], both[0])


def test_a_head_that_is_not_there_is_refused():
    model = build_classifier(SmallCnnConfig(width=4), 3, Normalization())
    with pytest.raises(ValueError, match="no auxiliary head"):
        model(torch.rand(2, 3, 8, 8), with_auxiliary_head=True)


def test_the_final_model_is_without_the_head_and_shares_its_weights():
    state = fresh(config())
    assert "auxiliary_head.0.weight" in state.model.state_dict()
    plain = fresh(config(head=None))
    assert set(state.final_model.state_dict()) == set(plain.final_model.state_dict())
    run(state, config())
    assert state.ema is not None
    assert not state.final_model.training
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(state.final_model(images), state.ema(images))
    # and exports as any other: same names, same number of bytes
    assert len(weights_to_bytes(state.final_model)) == len(weights_to_bytes(plain.final_model))


def test_initial_weights_are_the_same_with_and_without_the_head():
    with_head, without = fresh(config()), fresh(config(head=None))
    for name, value in without.model.state_dict().items():
        assert torch.equal(with_head.model.state_dict()[name], value)


def test_labels_alone_have_no_such_head():
    assert auxiliary_head(JointConfig(decoupled_head=DecoupledHeadConfig()), 0) is None
    baseline = config(unlabeled_ratio=0)
    assert fresh(baseline).model.auxiliary_head is None


@pytest.mark.parametrize("loses_the_head", [False, True])
def test_resume_is_exact_and_needs_the_head(loses_the_head: bool):
    cfg = config()
    straight, stopped, resumed = fresh(cfg), fresh(cfg), fresh(cfg, seed=7)
    untouched = copy.deepcopy(resumed.model.auxiliary_head)
    run(straight, cfg)
    run(stopped, cfg, until=3)
    resumed.restore(stopped.tensors(), stopped.scalars())
    if loses_the_head:
        assert untouched is not None
        assert resumed.model.auxiliary_head is not None
        resumed.model.auxiliary_head.load_state_dict(untouched.state_dict())
    run(resumed, cfg)
    assert equal(resumed.tensors(), straight.tensors()) is not loses_the_head


def test_every_parameter_is_used_through_distributed_data_parallel(tmp_path: Path):
    """Its second step raises where a parameter had no gradient in the first."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        cfg = config()
        plain, wrapped = fresh(cfg), fresh(cfg)
        run(plain, cfg)
        run(wrapped, cfg, forward_model=DistributedDataParallel(wrapped.model))
    finally:
        torch.distributed.destroy_process_group()
    assert equal(plain.tensors(), wrapped.tensors())
