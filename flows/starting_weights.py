"""Where a training's first weights come from: the choice, and what a run pins of it."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.architectures import ArchitectureConfig, architecture_name
from storage.store import Store
from tasks.classifiers import model_manifest, read_description
from tasks.initial_weights import WeightsMismatch, store_initial_weights


class _Init(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScratchInit(_Init):
    """Fresh random weights, as in the paper."""

    kind: Literal["scratch"] = "scratch"


class TeacherInit(_Init):
    """The round's teacher, whose architecture the student must have."""

    kind: Literal["teacher"] = "teacher"


class ModelInit(_Init):
    """A finished model of the store; its classes are matched by name."""

    kind: Literal["model"] = "model"
    model: str = Field(
        description="`models/<fingerprint>` in the run's store, or the URL that"
        " `selftrain import` and `selftrain status` print."
    )


class PretrainedInit(_Init):
    """Weights from elsewhere, copied into the store when the run is opened.

    All but the last layer must fit; that one is loaded where it has as many classes.
    """

    kind: Literal["pretrained"] = "pretrained"
    weights: str = Field(
        description="File or URL (safetensors, or a state dict saved by torch), or torchvision:NAME"
        " such as torchvision:IMAGENET1K_V1."
    )


TeacherInitConfig = Annotated[ScratchInit | ModelInit | PretrainedInit, Field(discriminator="kind")]
StudentInitConfig = Annotated[
    ScratchInit | TeacherInit | ModelInit | PretrainedInit, Field(discriminator="kind")
]


def pin_init(
    store: Store, init: StudentInitConfig, architecture: ArchitectureConfig, *, key: str
) -> str | None:
    """Return what names the weights in the store: a fingerprint or a sha256.

    None where they are drawn, or known only when the round has its teacher.

    Args:
        store: weights from elsewhere are copied into it.
        init: the choice.
        architecture: that the weights must fit.
        key: of the config, for messages.
    Raises: UnknownModel; WeightsMismatch; WeightsUnavailable; ValueError.
    """
    match init:
        case ScratchInit() | TeacherInit():
            return None
        case ModelInit():
            fingerprint = model_in_store(store, init.model, key=f"{key}.init.model")
            theirs = architecture_name(read_description(store, fingerprint).architecture)
            if theirs != architecture_name(architecture):
                raise WeightsMismatch(
                    f"{key}.init.model = {init.model} is a {theirs}, {key}.architecture a"
                    f" {architecture_name(architecture)}: weights can only be taken over by the"
                    " same architecture"
                )
            return fingerprint
        case PretrainedInit():
            return store_initial_weights(store, init.weights, architecture)


def model_in_store(store: Store, model: str, *, key: str) -> str:
    """Return the fingerprint of a finished model that a config names.

    Raises: ValueError for a URL outside the store; UnknownModel.
    """
    url = model.rstrip("/")
    fingerprint = url.rpartition("/")[2]
    if ("://" in url or url.startswith("/")) and url != store.url_of(f"models/{fingerprint}"):
        raise ValueError(
            f"{key} = {url} lies outside the run's store {store.url}; import it there:"
            f" selftrain import ... --store {store.url}"
        )
    model_manifest(store, fingerprint)
    return fingerprint
