"""Which images are mixed with which, and by how much: drawn for a batch from one seed.

Drawn on the CPU whatever the batch's device, so the draws are the same everywhere.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, assert_never

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.draws import scaled_integers
from models.noise.beta import WORDS_PER_GAMMA, beta_draws
from models.noise.cutmix import CutMixConfig, cutmix_boxes, kept_shares, paste
from models.noise.manifold_mixup import ManifoldMixupConfig
from models.noise.mixup import MixupConfig, mix_rows
from models.noise.prob_pseudo_mixup import ProbPseudoMixupConfig, confidence_shares


class MixupOrCutMixConfig(BaseModel):
    """Each batch is mixed by mixup or by CutMix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mixup_or_cutmix"] = "mixup_or_cutmix"
    mixup_alpha: float = Field(default=0.8, gt=0, le=100, description="Of mixup's Beta.")
    cutmix_alpha: float = Field(default=1.0, gt=0, le=100, description="Of CutMix's Beta.")
    cutmix_share: float = Field(
        default=0.5, gt=0, lt=1, description="Share of the mixed batches that CutMix mixes."
    )
    prob: float = Field(
        default=1.0, gt=0, le=1, description="Probability that a batch is mixed at all."
    )


MixingConfig = Annotated[
    MixupConfig | CutMixConfig | MixupOrCutMixConfig | ProbPseudoMixupConfig | ManifoldMixupConfig,
    Field(discriminator="kind"),
]


@dataclass(frozen=True)
class Pairs:
    """What becomes of the B rows of a batch.

    Attributes:
        partners: (B,) int64, the row that each is mixed with.
        lam: (B,) float64, the share of each row's own target.
        blend: (B,) float64, the share of each row's own pixels where images are blended; None:
            none are.
        boxes: (B, 4) int64, what is pasted; None: nothing is.
        layer: position among `ManifoldMixupConfig.layers` of what is blended; None: the images.
    """

    partners: Tensor
    lam: Tensor
    blend: Tensor | None = None
    boxes: Tensor | None = None
    layer: int | None = None

    def mix_images(self, images: Tensor) -> Tensor:
        """Return (B, 3, H, W) float images, blended and pasted."""
        mixed = images
        if self.blend is not None:
            mixed = mix_rows(images, self.partners, self.blend)
        if self.boxes is not None:
            mixed = paste(mixed, images[self.partners.to(images.device)], self.boxes)
        return mixed


def draw_pairs(
    config: MixingConfig,
    *,
    seed: int,
    num_labeled: int,
    confidences: Tensor | None,
    num_rows: int,
    size: tuple[int, int],
) -> Pairs:
    """Return the pairs of a batch whose first `num_labeled` rows are labelled.

    All rows are mixed with each other, labelled ones with pseudo-labelled ones too; a row may be
    its own partner. `prob_pseudo_mixup` alone keeps the two apart.

    Args:
        config: the technique.
        seed: of the batch.
        num_labeled: labelled rows.
        confidences: (B_u,) float in [0, 1] of the other rows; read by `prob_pseudo_mixup` only.
        num_rows: B, all rows.
        size: height and width of the images.
    Raises: ValueError where confidences are needed and absent.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(config, ProbPseudoMixupConfig):
        return _pairs_by_confidence(config, generator, num_labeled, confidences, num_rows, size)
    partners = torch.randperm(num_rows, generator=generator)
    match config:
        case MixupConfig():
            lam = _batch_share(generator, config.alpha, config.prob, num_rows)
            return Pairs(partners, lam, blend=lam)
        case CutMixConfig():
            lam = _batch_share(generator, config.alpha, config.prob, num_rows)
            return _pasted(generator, partners, lam, size)
        case MixupOrCutMixConfig():
            if not _happens(generator, config.cutmix_share):
                lam = _batch_share(generator, config.mixup_alpha, config.prob, num_rows)
                return Pairs(partners, lam, blend=lam)
            lam = _batch_share(generator, config.cutmix_alpha, config.prob, num_rows)
            return _pasted(generator, partners, lam, size)
        case ManifoldMixupConfig():
            layer = int(scaled_integers(_words(generator, 1), len(config.layers)))
            lam = _batch_share(generator, config.alpha, 1.0, num_rows)
            return Pairs(partners, lam, layer=layer)
        case _ as unreachable:
            assert_never(unreachable)


def _words(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 1 << 32, shape, generator=generator)


def _happens(generator: torch.Generator, probability: float) -> bool:
    return int(_words(generator, 1)) < round(probability * 2**32)


def _batch_share(generator: torch.Generator, alpha: float, prob: float, n: int) -> Tensor:
    """Return (n,) times the batch's one lambda, 1 where the batch is not mixed."""
    is_mixed = _happens(generator, prob)
    lam = beta_draws(_words(generator, 2 * WORDS_PER_GAMMA), alpha)
    return (lam if is_mixed else torch.ones_like(lam)).expand(n).clone()


def _pasted(
    generator: torch.Generator, partners: Tensor, lam: Tensor, size: tuple[int, int]
) -> Pairs:
    """One box for the whole batch, as released."""
    boxes = cutmix_boxes(_words(generator, 1, 2).expand(len(lam), 2), lam, *size)
    return Pairs(partners, kept_shares(boxes, *size), boxes=boxes)


def _pairs_by_confidence(
    config: ProbPseudoMixupConfig,
    generator: torch.Generator,
    num_labeled: int,
    confidences: Tensor | None,
    num_rows: int,
    size: tuple[int, int],
) -> Pairs:
    num_pseudo = num_rows - num_labeled
    if confidences is None and num_pseudo > 0:
        raise ValueError(
            "noise.mixing.kind=prob_pseudo_mixup mixes by the teacher's confidences, and the batch "
            "has none: fill pseudo_confidences, or take mixup"
        )
    labeled = torch.randperm(num_labeled, generator=generator)
    lam = torch.ones(num_labeled, dtype=torch.float64)
    if config.labeled_alpha is not None:
        lam = _batch_share(generator, config.labeled_alpha, 1.0, num_labeled)
    if confidences is None:
        return Pairs(labeled, lam, blend=lam)
    pseudo = torch.randperm(num_pseudo, generator=generator)
    kept = confidence_shares(confidences.cpu(), pseudo)
    is_cut = _words(generator, num_pseudo) < round(config.cutmix_share * 2**32)
    boxes = cutmix_boxes(
        _words(generator, num_pseudo, 2), torch.where(is_cut, kept, 1.0), *size
    )  # empty where the pair is blended
    own = torch.where(is_cut, kept_shares(boxes, *size), kept)
    no_boxes = torch.zeros(num_labeled, 4, dtype=torch.int64)
    return Pairs(
        torch.cat((labeled, pseudo + num_labeled)),
        torch.cat((lam, own)),
        blend=torch.cat((lam, torch.where(is_cut, 1.0, kept))),
        boxes=torch.cat((no_boxes, boxes)),
    )
