"""Mixing of a training batch: images, or hidden states, and with them targets and weights.

Targets stay distributions throughout: a mixed target is lam * q_i + (1 - lam) * q_j and never the
class that is largest in it.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.architectures import Classifier
from models.noise.manifold_mixup import (
    INPUT,
    ManifoldMixupConfig,
    mixed_states,
    named_layers,
)
from models.noise.mixing import MixingConfig, Pairs, draw_pairs
from models.noise.mixup import mix_rows
from models.noise.prob_pseudo_mixup import ProbPseudoMixupConfig, mixed_confidences
from models.objectives import Batch
from models.objectives.cross_entropy import smooth_labels
from models.randomness import derive_seed


def mix_batch(
    batch: Batch,
    config: MixingConfig,
    *,
    seed: int,
    label_smoothing: float,
    num_classes: int,
) -> Batch:
    """Return the batch with its rows mixed with each other, each keeping its place.

    Labels and hard pseudo-labels are smoothed first, soft ones are not. A row of a place for
    pseudo-labels has the weight lam * w_i + (1 - lam) * w_j, a labelled image weighing 1, and the
    target (lam * w_i * q_i + (1 - lam) * w_j * q_j) / that: with cross entropy this is the sum of
    the two weighted losses, and a pseudo-label of weight 0 enters no target. Places for labels
    always weigh 1. Confidences are mixed like weights; `prob_pseudo_mixup` takes the larger.

    The images of one unlabelled view are mixed with each other and have no targets: their teacher
    sees them mixed. With `manifold_mixup` images stay unless `input` is drawn; `mixing_forward`
    mixes the states.

    Args:
        batch: on any device.
        config: the technique.
        seed: of the batch (of step and part).
        label_smoothing: for labels and hard pseudo-labels, in [0, 1).
        num_classes: C.
    Returns: a batch with `label_targets`, and pseudo-targets that are not hard.
    Raises: ValueError for views that have no one meaning when mixed, and for missing confidences.
    """
    views = _mixed_views(batch, config, derive_seed(seed, "views"))
    if len(batch.images) == 0:
        return replace(batch, views=views)
    num_labeled = len(batch.labels)
    targets = smooth_labels(F.one_hot(batch.labels, num_classes).float(), label_smoothing)
    if batch.pseudo_targets is not None:
        pseudo = batch.pseudo_targets.to(targets.dtype)
        if batch.pseudo_is_hard:
            pseudo = smooth_labels(pseudo, label_smoothing)
        targets = torch.cat((targets, pseudo))  # (B, C)
    pairs = _pairs(batch, config, seed)
    targets, weights = _mixed_targets(targets, batch, pairs)
    return replace(
        batch,
        images=_mixed_images(batch.images, config, pairs),
        label_targets=targets[:num_labeled],
        pseudo_targets=None if batch.pseudo_targets is None else targets[num_labeled:],
        pseudo_weights=weights,
        pseudo_is_hard=False,
        pseudo_confidences=_confidences(batch, config, pairs),
        views=views,
    )


@contextmanager
def mixed(
    model: nn.Module,
    batch: Batch,
    config: MixingConfig | None,
    *,
    seed: int,
    label_smoothing: float,
) -> Generator[Batch]:
    """Give the mixed batch; a forward pass of it must happen within the block, and just one.

    Args:
        model: the classifier that is trained, or DistributedDataParallel of it.
        batch: on the model's device.
        config: the technique; with None the block gets the batch as it is.
        seed: of the batch (of step and part).
        label_smoothing: for labels and hard pseudo-labels, in [0, 1).
    Raises: ValueError, see `mix_batch` and `mixing_forward`.
    """
    if config is None:
        yield batch
        return
    mixed_batch = mix_batch(
        batch,
        config,
        seed=seed,
        label_smoothing=label_smoothing,
        num_classes=_classifier(model).num_classes,
    )
    with mixing_forward(model, config, seed=seed, num_rows=len(batch.images)):
        yield mixed_batch


@contextmanager
def mixing_forward(
    model: nn.Module, config: MixingConfig | None, *, seed: int, num_rows: int
) -> Generator[None]:
    """Mix hidden states within the block, as `mix_batch` of the same seed has mixed the targets.

    Does nothing but for `manifold_mixup` at a layer other than the input.

    Args:
        model: the classifier, or DistributedDataParallel of it; called once in the block.
        config: the technique; None for none.
        seed: of the batch, as given to `mix_batch`.
        num_rows: of the batch.
    Raises: ValueError for a layer that the network does not have or that cannot be mixed.
    """
    if not isinstance(config, ManifoldMixupConfig):
        yield
        return
    modules = named_layers(_classifier(model).backbone, config.layers)
    pairs = draw_pairs(
        config, seed=seed, num_labeled=num_rows, confidences=None, num_rows=num_rows, size=(1, 1)
    )
    assert pairs.layer is not None
    layer = config.layers[pairs.layer]
    if layer == INPUT:
        yield
        return
    with mixed_states(modules[layer], layer, pairs.partners, pairs.lam):
        yield


def _classifier(model: nn.Module) -> Classifier:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = cast("nn.Module", model.module)  # pyright: ignore[reportUnknownMemberType]
    assert isinstance(model, Classifier), f"mixing needs a Classifier, not {type(model).__name__}"
    return model


def _pairs(batch: Batch, config: MixingConfig, seed: int) -> Pairs:
    height, width = batch.images.shape[-2:]
    return draw_pairs(
        config,
        seed=seed,
        num_labeled=len(batch.labels),
        confidences=batch.pseudo_confidences,
        num_rows=len(batch.images),
        size=(height, width),
    )


def _mixed_images(images: Tensor, config: MixingConfig, pairs: Pairs) -> Tensor:
    if isinstance(config, ManifoldMixupConfig):
        assert pairs.layer is not None
        if config.layers[pairs.layer] != INPUT:
            return images
        return mix_rows(images, pairs.partners, pairs.lam)
    return pairs.mix_images(images)


def _mixed_targets(targets: Tensor, batch: Batch, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
    if batch.pseudo_weights is None:
        return mix_rows(targets, pairs.partners, pairs.lam), None
    device = targets.device
    lam, partners = pairs.lam.to(targets), pairs.partners.to(device)
    ones = torch.ones(len(batch.labels), device=device)
    weights = torch.cat((ones, batch.pseudo_weights.to(targets)))  # (B,)
    own, total = lam * weights, lam * weights + (1 - lam) * weights[partners]
    share = torch.where(total > 0, own / total.clamp(min=1e-30), lam)
    return mix_rows(targets, partners, share), total[len(batch.labels) :]


def _confidences(batch: Batch, config: MixingConfig, pairs: Pairs) -> Tensor | None:
    if batch.pseudo_confidences is None:
        return None
    pseudo = batch.pseudo_confidences
    all_rows = torch.cat((torch.ones(len(batch.labels)).to(pseudo), pseudo))
    partners = pairs.partners.to(pseudo.device)
    if isinstance(config, ProbPseudoMixupConfig):
        return mixed_confidences(all_rows, partners)[len(batch.labels) :]
    return mix_rows(all_rows, partners, pairs.lam)[len(batch.labels) :]


def _mixed_views(batch: Batch, config: MixingConfig, seed: int) -> dict[str, Tensor]:
    if not batch.views:
        return {}
    if len(batch.views) > 1 or not next(iter(batch.views)).startswith("unlabeled"):
        raise ValueError(
            f"noise.mixing.kind={config.kind}: the objective compares several views of an image "
            f"({', '.join(sorted(batch.views))}), which mixing would make views of different "
            "pairs: remove noise.mixing, or take the objective joint or distillation"
        )
    if isinstance(config, ManifoldMixupConfig | ProbPseudoMixupConfig):
        raise ValueError(
            f"noise.mixing.kind={config.kind} needs pseudo-labels that are stored, and the "
            "objective makes them from the images as it goes: take mixup, cutmix or "
            "mixup_or_cutmix"
        )
    ((name, images),) = batch.views.items()
    height, width = images.shape[-2:]
    pairs = draw_pairs(
        config,
        seed=seed,
        num_labeled=0,
        confidences=None,
        num_rows=len(images),
        size=(height, width),
    )
    return {name: pairs.mix_images(images)}
