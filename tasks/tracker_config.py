"""Where a run's metrics are also written: trackers that others read."""

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class TensorBoardTracker(BaseModel):
    """Event files for `tensorboard --logdir FOLDER`; `pip install 'selftrain[tensorboard]'`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["tensorboard"] = "tensorboard"
    folder: str = Field(
        min_length=1,
        description="Local folder; a run writes below FOLDER/<run name>. A relative one is taken"
        " from where the run is started.",
    )

    @field_validator("folder")
    @classmethod
    def _is_local(cls, folder: str) -> str:
        if "://" in folder:
            raise ValueError(
                f"folder={folder!r} is a URL: event files are appended to, which object stores"
                " cannot do. Name a local or mounted folder"
            )
        return folder

    @property
    def path(self) -> Path:
        """The folder of all runs."""
        return Path(self.folder).expanduser()


class MlflowTracker(BaseModel):
    """A run in MLflow for each run of ours; `pip install 'selftrain[mlflow]'`.

    Credentials are MLflow's own, from the environment: MLFLOW_TRACKING_USERNAME and _PASSWORD, or
    MLFLOW_TRACKING_TOKEN.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = Field(
        default=None,
        description="Of the tracking server (http://host:5000) or of a database"
        " (sqlite:///mlflow.db), without credentials; null: the environment's MLFLOW_TRACKING_URI.",
    )
    experiment: str = Field(
        default="selftrain", min_length=1, description="Made where it is not there."
    )

    # Of the whole model: messages about a single field show its value.
    @model_validator(mode="after")
    def _has_no_credentials(self) -> "MlflowTracker":
        if self.uri is not None and "@" in urlsplit(self.uri).netloc:
            raise ValueError(
                "uri holds credentials, and a config is stored and shown: leave them out, and set"
                " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or all of"
                " MLFLOW_TRACKING_URI, in the environment"
            )
        return self


TrackerConfig = Annotated[TensorBoardTracker | MlflowTracker, Field(discriminator="kind")]
