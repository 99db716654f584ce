"""How long something lasts: in steps, in passes over the labels, or in labelled images."""

from fractions import Fraction
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Duration(BaseModel):
    """A length of training, given in exactly one unit.

    Everything counts labelled images: pseudo-labelled ones ride along at the unlabelled ratio, so
    changing that ratio changes neither the number of steps nor the schedule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(default=None, ge=1, description="Optimiser steps.")
    labeled_epochs: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Passes over the labelled images; fractions are allowed.",
    )
    samples_seen: int | None = Field(
        default=None,
        ge=1,
        description="Labelled images drawn, repetitions counted, pseudo-labelled ones not counted.",
    )

    @model_validator(mode="after")
    def _exactly_one_unit(self) -> Self:
        given = {
            name: value
            for name, value in (
                ("steps", self.steps),
                ("labeled_epochs", self.labeled_epochs),
                ("samples_seen", self.samples_seen),
            )
            if value is not None
        }
        if len(given) != 1:
            raise ValueError(
                f"a duration needs exactly one of steps, labeled_epochs, samples_seen; got "
                f"{given or 'none'}: leave one of them"
            )
        return self

    def __str__(self) -> str:
        given = {name: value for name, value in self if value is not None}
        return ", ".join(f"{name}: {value}" for name, value in given.items())

    def certainly_reaches(self, other: "Duration") -> bool:
        """Return whether this is at least as long as another of the same unit.

        Of different units that depends on the data, and False is returned.
        """
        pairs = [(value, getattr(other, name)) for name, value in self if value is not None]
        return all(there is not None and value >= there for value, there in pairs)

    def exact_steps(self, *, batch_size: int, num_labeled: int) -> Fraction:
        """The length in steps before rounding.

        Args:
            batch_size: labelled images a step, over all ranks.
            num_labeled: labelled images in one epoch.
        Raises: ValueError if either is smaller than 1.
        """
        if batch_size < 1 or num_labeled < 1:
            raise ValueError(
                f"batch_size={batch_size} and num_labeled={num_labeled} must both be at least 1"
            )
        if self.steps is not None:
            return Fraction(self.steps)
        if self.samples_seen is not None:
            return Fraction(self.samples_seen, batch_size)
        # The decimal that the user wrote, not its binary neighbour: 0.29 epochs of 100 are 29.
        return Fraction(repr(self.labeled_epochs)) * num_labeled / batch_size

    def to_steps(self, batch_size: int, num_labeled: int) -> int:
        """The length in whole steps: rounded down, but at least 1.

        Rounding down is the released code's: 350 epochs of 1,281,167 images at 4,096 a step are
        109,474.7 steps and last 109,474 (noisystudent main.py).
        """
        return max(1, int(self.exact_steps(batch_size=batch_size, num_labeled=num_labeled)))
