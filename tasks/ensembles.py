"""The members of a labeler, teachers, views and dropout passes, and what they say together."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.aggregation import McDropoutConfig, NoUncertaintyConfig, combine
from models.inference import Precision, log_probabilities
from models.mc_dropout import dropout_passes
from models.randomness import derive_seed
from models.views import check_views, view_sizes
from storage.store import Store
from tasks.batch_sizes import filled_size
from tasks.classifiers import (
    StoredClassifier,
    load_classifier,
    model_manifest,
    read_description,
)
from tasks.labeling_config import LabelingConfig
from tasks.teacher_views import Shown, TeacherViews


@dataclass(frozen=True)
class BatchPrediction:
    """What a labeler says of the images of one batch.

    Attributes:
        log_probs: (B, C) float32.
        logsumexp: (B,) float32.
        uncertainty: (B,) float32, where it is measured.
        agreement: (B,) float32, where there are several members.
    """

    log_probs: NDArray[np.float32]
    logsumexp: NDArray[np.float32]
    uncertainty: NDArray[np.float32] | None = None
    agreement: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Ensemble:
    """Who labels, what they are shown, and how it is put together; by default one clean look.

    Attributes:
        teachers: in the order of their fingerprints, of one class order.
        config: views, aggregation, uncertainty and precision.
        dropout_rates: of the teachers, where dropout stays on.
    """

    teachers: tuple[StoredClassifier, ...]
    config: LabelingConfig = field(default_factory=LabelingConfig)
    dropout_rates: tuple[float, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The label space, in the order of the outputs."""
        return self.teachers[0].class_names

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.teachers[0].device

    @property
    def largest_view(self) -> int:
        """Side of the largest view of any teacher, pixels."""
        sizes = (view_sizes(self.config.view, one.description.image_size) for one in self.teachers)
        return max(max(one) for one in sizes)

    @property
    def _is_single(self) -> bool:
        return self.config.num_members(len(self.teachers)) == 1

    @property
    def views(self) -> TeacherViews:
        """What the teachers are shown."""
        return TeacherViews(
            self.config.view, tuple(Shown.of(one.description) for one in self.teachers)
        )

    def predict(
        self, views: Sequence[Tensor], *, shard: str, batch: int, batch_size: int = 0
    ) -> BatchPrediction:
        """Predict a batch.

        Args:
            views: T * V tensors (B, S, S, 3) uint8, in the order of `views`.
            shard: digest of the shard.
            batch: which of the shard's batches it is; with `shard` it settles what dropout drops.
            batch_size: of a whole batch; on a GPU others are filled up to one of a few sizes.
        """
        log_probs: list[NDArray[np.float32]] = []
        log_sums: list[NDArray[np.float32]] = []
        num_views = len(views) // len(self.teachers)
        for slot, images in enumerate(views):
            teacher = slot // num_views
            with self._dropout(teacher, slot, shard=shard, batch=batch):
                probs, sums = forward(
                    images,
                    self.teachers[teacher],
                    self.config.precision,
                    filled_to=self._filled_size(len(images), batch_size),
                )
            log_probs.append(probs)
            log_sums.append(sums)
        if self._is_single:
            return BatchPrediction(log_probs[0], log_sums[0])
        num_images = len(views[0])
        passes = len(log_probs[0]) // num_images
        members = (len(self.teachers), num_views, passes, num_images)
        combined = combine(
            torch.from_numpy(np.stack(log_probs)).reshape(*members, -1),
            torch.from_numpy(np.stack(log_sums)).reshape(members),
            aggregate=self.config.aggregate,
            uncertainty=self.config.uncertainty,
        )
        return BatchPrediction(
            combined.log_probs.numpy(),
            combined.log_sums.numpy(),
            None if combined.uncertainty is None else combined.uncertainty.numpy(),
            combined.agreement.numpy(),
        )

    def joined(self, batches: Sequence[BatchPrediction]) -> BatchPrediction:
        """Return the predictions of all batches behind each other; of none, arrays of no rows."""
        no_rows = np.zeros(0, np.float32)
        nothing = BatchPrediction(
            np.zeros((0, len(self.class_names)), np.float32),
            no_rows,
            None if isinstance(self.config.uncertainty, NoUncertaintyConfig) else no_rows,
            None if self._is_single else no_rows,
        )
        together: dict[str, NDArray[np.float32] | None] = {}
        for one in fields(BatchPrediction):
            empty = getattr(nothing, one.name)
            parts = [getattr(batch, one.name) for batch in batches]
            together[one.name] = None if empty is None else np.concatenate([empty, *parts])
        return BatchPrediction(**together)  # pyright: ignore[reportArgumentType] (None as above)

    def _filled_size(self, num_images: int, batch_size: int) -> int:
        # Dropout would draw for the images that fill it up, too, and drop other units of the rest.
        is_dropping = isinstance(self.config.uncertainty, McDropoutConfig)
        if self.device.type != "cuda" or is_dropping or not batch_size:
            return num_images
        return filled_size(num_images, batch_size)

    def _dropout(
        self, teacher: int, slot: int, *, shard: str, batch: int
    ) -> AbstractContextManager[None]:
        uncertainty = self.config.uncertainty
        if not isinstance(uncertainty, McDropoutConfig):
            return nullcontext()
        return dropout_passes(
            self.teachers[teacher].ready(self.config.precision),
            passes=uncertainty.passes,
            rate=self.dropout_rates[teacher],
            seed=derive_seed(uncertainty.seed, "mc-dropout", shard, batch, slot),
        )


def load_ensemble(
    store: Store,
    models: Sequence[str],
    config: LabelingConfig,
    *,
    device: torch.device,
    class_names: Sequence[str],
) -> Ensemble:
    """Load the teachers of a labeler, in the order of their fingerprints.

    Raises: UnknownModel, ClassesMismatch; ValueError for a network that cannot take a view's size
        or for dropout without a rate.
    """
    for model in models:
        check_teacher(store, model, config)
    teachers = tuple(
        load_classifier(store, model, device=device, class_names=class_names)
        for model in sorted(models)
    )
    rates: tuple[float, ...] = ()
    if isinstance(config.uncertainty, McDropoutConfig):
        given = config.uncertainty.rate
        rates = tuple(given or _trained_dropout(store, one.fingerprint) for one in teachers)
    return Ensemble(teachers, config, rates)


def check_teacher(store: Store, model: str, config: LabelingConfig) -> None:
    """Refuse a finished model that cannot label in a certain way.

    Raises: UnknownModel; ValueError for a network that cannot take a view's size, or for dropout
        without a rate.
    """
    shown = read_description(store, model)
    check_views(config.view, shown.architecture, shown.image_size)
    uncertainty = config.uncertainty
    if isinstance(uncertainty, McDropoutConfig) and not uncertainty.rate:
        _trained_dropout(store, model)


def _trained_dropout(store: Store, model: str) -> float:
    training = model_manifest(store, model).settings.get("training", {})
    rate = training.get("noise", {}).get("dropout")
    if not rate:
        raise ValueError(
            f"labeling.uncertainty=mc_dropout: model {model[:12]} was trained without dropout, so"
            " its passes would not differ: train it with noise.dropout, or set"
            " labeling.uncertainty.rate"
        )
    return float(rate)


def forward(
    views: Tensor, classifier: StoredClassifier, precision: Precision, *, filled_to: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return (B, C) log-probabilities and (B,) logsumexp of B views (B, S, S, 3) uint8.

    Under `dropout_passes` there are P * B rows. The network is given `filled_to` images where these
    are more; the additional ones are copies of the last.
    """
    is_remote = classifier.device.type == "cuda"
    if is_remote and not views.is_pinned():
        views = views.pin_memory()
    images = views.to(classifier.device, non_blocking=is_remote)
    num_images = None
    if filled_to > len(views):
        num_images = len(views)
        copies = images[-1:].expand(filled_to - num_images, *images.shape[1:])
        images = torch.cat([images, copies])
    # (B, S, S, 3) uint8 is (B, 3, S, S) in channels-last memory: no copy.
    log_probs, log_sums = log_probabilities(
        classifier.ready(precision), images.permute(0, 3, 1, 2), num_images=num_images
    )
    return log_probs.cpu().numpy(), log_sums.cpu().numpy()
