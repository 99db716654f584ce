"""Where a corpus is labelled: processes of this machine, a Dask cluster or a Ray cluster."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_WORKERS = "Workers of a local cluster; auto: one for each GPU, or for each core without one."
_NUM_GPUS = (
    "GPUs of a group of shards: 1 waits for one of its own and computes there, 0 computes on the"
    " CPU; auto: 1 where the run's device is CUDA."
)


class LocalEngine(BaseModel):
    """Worker processes of this machine: one for each GPU, or for each core without one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["local"] = "local"
    processes: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = Field(
        default="auto",
        description="Worker processes at most, of a labelling and of a selection; 0: none, the run"
        " itself does it (for a debugger); auto: one for each GPU, or for each core without one and"
        " for a selection; none for a small corpus.",
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        default="auto",
        description="CPU threads of each process, or beside a GPU processes that decode for it;"
        " auto: beside a GPU its share of the cores, and else one. More than one on the CPU is for"
        " models too large to lie in memory once for each core; it may change the last bits of a"
        " prediction.",
    )


class DaskEngine(BaseModel):
    """A Dask cluster; `pip install 'selftrain[dask]'`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["dask"] = "dask"
    address: str | None = Field(
        default=None,
        description="Scheduler of a cluster that is there, such as tcp://host:8786; null: a local"
        " cluster for as long as the labelling takes.",
    )
    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        default="auto", description=_WORKERS
    )
    num_gpus: Literal[0, 1, "auto"] = Field(
        default="auto",
        description=f"{_NUM_GPUS} Workers offer them as the resource GPU"
        ' (`dask worker --resources "GPU=1"`, one worker a GPU).',
    )


class RayEngine(BaseModel):
    """A Ray cluster; `pip install 'selftrain[ray]'`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ray"] = "ray"
    address: str | None = Field(
        default=None,
        description="A cluster that is there, such as ray://host:10001; null: a local one for as"
        " long as the labelling takes.",
    )
    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        default="auto", description=_WORKERS
    )
    num_gpus: Literal[0, 1, "auto"] = Field(default="auto", description=_NUM_GPUS)


EngineConfig = Annotated[LocalEngine | DaskEngine | RayEngine, Field(discriminator="kind")]

LOCAL_ENGINE = LocalEngine()
