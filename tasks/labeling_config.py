"""How images are labelled: settings of the teachers' predictions, and of what is kept of them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.aggregation import (
    Aggregate,
    McDropoutConfig,
    NoUncertaintyConfig,
    UncertaintyConfig,
)
from models.views import CleanViewConfig, ViewConfig, view_sizes
from storage.damaged_predictions import Verification
from storage.predictions import Form

MAX_FULL_CLASSES = 256
"""With labeling.form=auto: above it, most of the full form's bytes would be of classes that no
image is of."""


class LabelingConfig(BaseModel):
    """How teachers label: EMA weights, evaluation mode, by default the clean view."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="bf16: weights and activations, the softmax is float32; part of the address.",
    )
    form: Literal["full", "top_k", "auto"] = Field(
        default="auto",
        description="full: the log-probability of every class is stored, as fp16. top_k: those of"
        " the k most probable classes and the mass of the rest, calibrated by the temperature of"
        " the dev split, which is fitted before labelling. auto: full up to 256 classes, else"
        " top_k.",
        json_schema_extra={"fingerprint": "excluded"},  # what it comes to is in it
    )
    k: int = Field(
        default=10,
        ge=1,
        description="Classes listed of each image where the form is top_k.",
        json_schema_extra={"fingerprint": "excluded"},  # in it where the form is top_k
    )
    view: ViewConfig = Field(
        default=CleanViewConfig(),
        description="What every teacher is shown of an image; predictions of several views are"
        " averaged.",
        json_schema_extra={"absent_means": {"kind": "clean"}},
    )
    aggregate: Aggregate = Field(
        default="mean_prob",
        description="How predictions of several views, teachers or passes become one: the mean of"
        " probabilities or of logits.",
        json_schema_extra={"absent_means": "mean_prob"},
    )
    uncertainty: UncertaintyConfig = Field(
        default=NoUncertaintyConfig(),
        description="Over what the standard deviation of the predicted class's probability is"
        " taken, for selection.threshold.kind uncertainty.",
        json_schema_extra={"absent_means": {"kind": "none"}},
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Images a forward pass; batches never cross shards. auto is chosen once per"
        " labeler by image size and device, written down, and obeyed by every worker and resume.",
        json_schema_extra={"fingerprint": "excluded"},
    )
    shards_per_task: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Shards of one Prefect task; auto: minutes of work, at most 100 tasks a"
        " labelling.",
        json_schema_extra={"fingerprint": "excluded"},
    )
    verify: Verification = Field(
        default="full",
        description="How a labelling that goes on looks at predictions that are recorded already:"
        " full reads them and compares checksums, size only asks how long they are. Damaged ones"
        " are made again.",
        json_schema_extra={"fingerprint": "excluded"},
    )

    def num_members(self, num_teachers: int = 1) -> int:
        """Return how many predictions of an image are made and averaged."""
        uncertainty = self.uncertainty
        passes = uncertainty.passes if isinstance(uncertainty, McDropoutConfig) else 1
        return num_teachers * len(view_sizes(self.view, 1)) * passes

    def is_clean(self, num_teachers: int = 1) -> bool:
        """Return whether an image is predicted once, from the clean view, as a validation does."""
        return isinstance(self.view, CleanViewConfig) and self.num_members(num_teachers) == 1

    def for_dev(self) -> "LabelingConfig":
        """Return how dev is labelled to calibrate these labels: alike, all classes stored."""
        return self.model_copy(update={"form": "full"})

    def check_members(self, num_teachers: int = 1) -> None:
        """Raise ValueError if a setting cannot take effect with so many teachers."""
        num_views = len(view_sizes(self.view, 1))
        kind = self.uncertainty.kind
        if (kind == "views" and num_views < 2) or (kind == "teachers" and num_teachers < 2):
            raise ValueError(
                f"labeling.uncertainty={kind} is a deviation over {kind}, of which there is one:"
                f" take several {kind}, or mc_dropout"
            )
        if self.aggregate != "mean_prob" and self.num_members(num_teachers) == 1:
            raise ValueError(
                f"labeling.aggregate={self.aggregate}: one prediction is made of each image, so"
                " there is nothing to aggregate: leave it out, or choose a view"
            )


def resolved_form(config: LabelingConfig, num_classes: int) -> Form:
    """Return the form in which predictions of so many classes are stored.

    Raises: ValueError if there are fewer classes than are to be listed.
    """
    form = config.form
    if form == "auto":
        form = "full" if num_classes <= MAX_FULL_CLASSES else "top_k"
    if form == "top_k" and config.k > num_classes:
        raise ValueError(
            f"labeling.k={config.k} with labeling.form={config.form}: there are {num_classes}"
            " classes to list; lower it, or use form=full"
        )
    return form
