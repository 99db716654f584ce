"""What an objective reads: its streams, and one batch of them as tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

ViewKind = Literal["weak", "strong"]
"""strong: all input noise of the config; weak: its crop and flip alone."""


@dataclass(frozen=True)
class Stream:
    """A source of samples that an objective asks for."""

    role: Literal["labeled", "pseudo_labeled", "unlabeled"]
    samples_per_step: int
    """Over all ranks."""
    views: tuple[ViewKind, ...] = ("strong",)
    """What is made of each image, each with draws of its own."""
    with_selection: bool = False
    """Whether targets, weights and copies come from a selection, not from .cls members."""


@dataclass(frozen=True)
class Batch:
    """One step's samples (or one of the equal parts of a step), noised, labelled ones first.

    Attributes:
        images: (B_l + B_u, 3, H, W) float in [0, 1]; the first view of each stream with targets.
        labels: (B_l,) int64, class ids of the first B_l images; may be empty only beside
            pseudo-targets or views.
        label_targets: (B_l, C) float, what mixing made of the labels, smoothing included; None
            without mixing.
        pseudo_targets: (B_u, C) float, rows sum to 1 (one-hot where hard), or None without stream.
        pseudo_weights: (B_u,) float, non-negative; None means 1 each.
        pseudo_is_hard: targets are one-hot and get label smoothing; soft ones never do.
        pseudo_confidences: (B_u,) float in [0, 1], the teacher's; None where nothing reads it.
        views: further images by name: `unlabeled_weak` and `unlabeled_strong` (B_u, 3, H, W) of an
            unlabelled stream; `labeled_2`, `pseudo_labeled_2`, ... second and later views.
    Raises: ValueError where the sizes do not fit together.
    """

    images: Tensor
    labels: Tensor
    pseudo_targets: Tensor | None = None
    pseudo_weights: Tensor | None = None
    pseudo_is_hard: bool = False
    label_targets: Tensor | None = None
    pseudo_confidences: Tensor | None = None
    views: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        num_pseudo = 0 if self.pseudo_targets is None else len(self.pseudo_targets)
        is_empty = len(self.images) == 0 and not self.views
        if is_empty or len(self.images) != len(self.labels) + num_pseudo:
            raise ValueError(
                f"batch of {len(self.images)} images with {len(self.labels)} labels and "
                f"{num_pseudo} pseudo-targets: images must be labels + pseudo-targets, at least 1 "
                "where there are no views"
            )
        if self.pseudo_weights is not None and self.pseudo_weights.shape != (num_pseudo,):
            raise ValueError(
                f"pseudo_weights of shape {tuple(self.pseudo_weights.shape)}: must be "
                f"({num_pseudo},), one per pseudo-target"
            )
        if not self.images.is_floating_point():
            raise ValueError(
                f"images of dtype {self.images.dtype}: must be floating point in [0, 1]; "
                "apply_input_noise gives that"
            )
