"""How a training reads its images: what may change its speed and never its result."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from storage.shard_cache import CacheConfig

MaterializeChoice = Literal["auto", "always", "never"]
MATERIALIZE: Any = Field(
    default="auto",
    description="Whether the images of a selection are written once more, into compact shards that"
    " its trainings read. auto: of a corpus that fits neither memory nor the cache, if at most a"
    " quarter of it is selected and that is read three times or more. Changes no result.",
)
LOADER_THREADS: Any = Field(
    default=None,
    ge=1,
    le=256,
    description="Threads of each process that decode images; null: one a core. Changes no result.",
)
CACHE: Any = Field(
    default=None,
    description="Cache of the whole shards that trainings read, on the node's disk; null reads them"
    " from where they lie. Changes no result.",
)


class LoadingConfig(BaseModel):
    """What a worker is told about reading, beside what it is to read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: CacheConfig | None = CACHE
    loader_threads: int | None = LOADER_THREADS
    materialize: MaterializeChoice = MATERIALIZE


PLAIN_LOADING = LoadingConfig()
