"""What a training reads beside images: the weights it starts from, its teacher, a class prior."""

import torch
from torch import Tensor, nn

from models.architectures import Classifier, freeze_shallow
from models.objectives import calls_teacher, reads_class_prior
from models.training import TrainingConfig
from storage.manifest import InputReference, Manifest
from storage.store import Store
from tasks.class_prior import class_prior
from tasks.classifiers import load_classifier, model_manifest
from tasks.initial_weights import initialise_from_model, initialise_from_weights
from tasks.specifications import Specification


def start_from(store: Store, specification: Specification, model: Classifier) -> None:
    """Load what a training starts from into fresh weights, and freeze what is to stand still.

    Raises: UnknownModel; WeightsMismatch.
    """
    inputs, settings = specification.inputs, specification.settings
    if "init" in inputs:
        initialise_from_model(store, inputs["init"], model, settings["class_names"])
    elif "init_weights" in inputs:
        initialise_from_weights(store, inputs["init_weights"], model)
    freeze_shallow(model, settings.get("frozen_fraction", 0.0))


def frozen_teacher(
    store: Store, specification: Specification, config: TrainingConfig, *, device: torch.device
) -> nn.Module | None:
    """Return the round's teacher in evaluation mode, where the objective calls one.

    Raises: ValueError if it was made for another image size than the student's views have.
    """
    if not calls_teacher(config.objective):
        return None
    fingerprint = specification.inputs["teacher"]
    names = specification.settings["class_names"]
    teacher = load_classifier(store, fingerprint, device=device, class_names=names)
    if teacher.description.image_size != config.image_size:
        raise ValueError(
            f"the teacher models/{fingerprint} is made for {teacher.description.image_size} pixels"
            f" and would be shown the student's own views of {config.image_size}: give both one"
            " image_size, or distil from stored labels (objective.kind: joint)"
        )
    return teacher.network.requires_grad_(False)


def prior_of_classes(
    store: Store, config: TrainingConfig, labeling: Manifest | None
) -> Tensor | None:
    """Return the teacher's mean prediction, where the objective reads it and has pseudo-labels."""
    if labeling is None or not reads_class_prior(config.objective):
        return None
    return class_prior(store, labeling)


def references(
    store: Store, specification: Specification, selection: Manifest | None
) -> dict[str, InputReference]:
    """Return what the manifest says of each input: its name and the manifest that was read."""
    found: dict[str, InputReference] = {}
    for role, name in specification.inputs.items():
        if role == "selection":
            assert selection is not None, "it was read"
            found[role] = InputReference(name, selection.sha256)
        elif role in ("init", "teacher"):
            found[role] = InputReference(name, model_manifest(store, name).sha256)
        else:  # corpora and stored weights are named by their contents
            found[role] = InputReference(name, name)
    return found
