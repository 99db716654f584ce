"""Models in the store, and their outputs in the run's class order."""

import json

import pytest
import torch

from models.description import ModelDescription, main_head, weights_from_bytes
from storage.manifest import read_stored
from storage.store import CorruptObject
from tasks.classifiers import (
    ClassesMismatch,
    UnknownModel,
    class_order,
    load_classifier,
    model_manifest,
    read_description,
)

CPU = torch.device("cpu")
IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def logits(classifier):
    with torch.inference_mode():
        return classifier.network(IMAGES)


def test_a_model_is_what_training_described(pipeline):
    store, teacher = pipeline.lab.store, pipeline.teacher
    description = read_description(store, teacher.fingerprint)
    assert description.class_names == ("red", "green", "blue")
    assert (description.image_size, description.crop_padding) == (8, 0)
    assert description.interpolation == "bilinear"
    assert description.lineage == {
        "fingerprint": teacher.fingerprint,
        "role": "teacher",
        "round_index": 0,
        "inputs": {"labeled": pipeline.lab.labeled.digest},
        "weights": "ema",
    }
    weights = weights_from_bytes(read_stored(store, teacher.object("model")), where="test")
    assert [tuple(w.shape) for name, w in weights.items() if name.endswith("fc.bias")] == [(3,)]


def test_a_loaded_classifier_is_in_eval_mode_and_says_where_it_comes_from(pipeline):
    teacher = pipeline.teacher.fingerprint
    classifier = load_classifier(pipeline.lab.store, teacher, device=CPU)
    assert not classifier.network.training
    assert classifier.fingerprint == teacher
    assert classifier.class_names == ("red", "green", "blue")
    assert logits(classifier).shape == (5, 3)
    assert torch.equal(logits(classifier), logits(classifier))


def test_outputs_are_put_into_the_asked_class_order(pipeline):
    store, teacher = pipeline.lab.store, pipeline.teacher.fingerprint
    own = logits(load_classifier(store, teacher, device=CPU))
    asked = ["blue", "red", "green"]
    other = load_classifier(store, teacher, device=CPU, class_names=asked)
    assert other.class_names == ("blue", "red", "green")
    assert torch.equal(logits(other), own[:, [2, 0, 1]])
    # The description is the model's own and stays as stored.
    assert other.description.class_names == ("red", "green", "blue")


def test_other_classes_are_refused_with_the_names_of_both_sides(pipeline):
    with pytest.raises(ClassesMismatch) as caught:
        load_classifier(
            pipeline.lab.store,
            pipeline.teacher.fingerprint,
            device=CPU,
            class_names=["red", "green", "azure", "pink"],
        )
    message = str(caught.value)
    assert f"models/{pipeline.teacher.fingerprint} knows 3 classes, the corpus has 4" in message
    assert "only in the corpus: azure, pink" in message
    assert "only in the model: blue" in message
    assert "matched by name, in any order: rename them" in message


def test_the_message_shows_five_names_and_counts_the_rest():
    with pytest.raises(ClassesMismatch, match=r"corpus: a, b, c, d, e, \.\.\. \(7 in all\); only"):
        class_order(["x"], ["x", *"abcdefg"], model="m")


def test_class_order_maps_wanted_positions_to_theirs():
    assert class_order(["a", "b", "c"], ["c", "a", "b"], model="m") == [2, 0, 1]
    assert class_order(["a", "b"], ["a", "b"], model="m") == [0, 1]


def test_an_unknown_model_names_store_and_remedy(lab):
    with pytest.raises(UnknownModel) as caught:
        model_manifest(lab.store, "0" * 64)
    assert f"models/{'0' * 64} in {lab.store.url}" in str(caught.value)
    assert "selftrain import" in str(caught.value)


def test_a_damaged_model_file_is_never_loaded(lab):
    teacher = lab.train()
    path = lab.store.url_of(teacher.object("model").path)
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorruptObject, match=teacher.object("model").sha256):
        load_classifier(lab.store, teacher.fingerprint, device=CPU)


def test_the_stored_description_is_json_that_names_the_head(pipeline):
    stored = pipeline.teacher.object("description")
    body = json.loads(read_stored(pipeline.lab.store, stored))
    heads = main_head(("red", "green", "blue"))
    assert body["heads"] == [head.model_dump(mode="json") for head in heads]
    assert ModelDescription.model_validate(body).architecture.kind == "small_cnn"
