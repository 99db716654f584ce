"""Who labels beside a round's teacher: the other members of an ensemble."""

from pydantic import BaseModel, ConfigDict, Field


class ExtraTeachersConfig(BaseModel):
    """Models that label with the round's teacher; the predictions of all are averaged.

    A model that is named twice over, or is the round's teacher itself, counts once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...] = Field(
        default=(),
        description="Finished models of the store, as teacher.model names one: fingerprints,"
        " `models/<fingerprint>`, or URLs that `selftrain import` and `selftrain status` print.",
    )
    earlier_rounds: int = Field(
        default=0,
        ge=0,
        le=50,
        description="How many of the promoted models before the round's teacher label with it, the"
        " newest first; in round 1 there is none, in round 2 the model of round 0.",
    )

    def num_teachers(self, round_index: int) -> int:
        """Return how many models label in a round, from 1, if none is named twice over."""
        return 1 + min(self.earlier_rounds, round_index - 1) + len(self.models)


NO_EXTRA_TEACHERS = ExtraTeachersConfig()
