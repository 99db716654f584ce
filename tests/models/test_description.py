"""Models on disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models.architectures import (
    Classifier,
    Normalization,
    SmallCnnConfig,
    VitConfig,
    build_classifier,
)
from models.description import (
    ModelDescription,
    UnreadableModel,
    description_from_json,
    load_model,
    main_head,
    model_from_weights,
    save_model,
    weights_from_bytes,
    weights_to_bytes,
)

_NAMES = ("zebra", "ant", "Ærø")


def _description(**changes: Any) -> ModelDescription:
    fields: dict[str, Any] = {
        "architecture": SmallCnnConfig(width=4),
        "heads": main_head(_NAMES),
        "image_size": 16,
        "normalization": Normalization(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
        "lineage": {"run": "demo", "round": 2},
    }
    return ModelDescription(**(fields | changes))


def _classifier(description: ModelDescription, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return build_classifier(
        description.architecture, len(description.class_names), description.normalization
    )


def test_a_saved_model_loads_in_three_lines_and_computes_the_same(tmp_path: Path) -> None:
    description = _description()
    classifier = _classifier(description).eval()
    save_model(tmp_path / "out", classifier, description)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    model = load_model(tmp_path / "out")

    logits = classifier(images)
    assert torch.equal(model(images), logits)
    assert model.predict(images) == [_NAMES[i] for i in logits.argmax(1).tolist()]
    assert torch.allclose(model.probabilities(images).sum(1), torch.ones(5))
    assert model.class_names == _NAMES
    assert not model.classifier.training
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "model.json",
        "model.safetensors",
    ]


def test_arrays_of_rows_and_columns_are_the_same_images(tmp_path: Path) -> None:
    save_model(tmp_path, _classifier(_description()), _description())
    model = load_model(str(tmp_path))
    array = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    assert torch.equal(model(array), model(tensor))
    assert torch.equal(model(array), model(tensor.float() / 255))


def test_class_names_keep_their_order_whatever_it_is(tmp_path: Path) -> None:
    for number, names in enumerate([("b", "a"), ("a", "b"), ("10", "9", "1")]):
        description = _description(heads=main_head(names))
        save_model(tmp_path / str(number), _classifier(description), description)
        assert load_model(tmp_path / str(number)).class_names == names


def test_description_survives_json_and_bears_its_schema() -> None:
    description = _description()
    data = description.to_json()
    assert json.loads(data)["schema"] == 1
    assert description_from_json(data, where="here") == description
    assert description_from_json(data, where="here").to_json() == data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not a JSON model description"),
        (b"[]", "schema None"),
        (b'{"schema": 2}', "schema 2, this version of selftrain reads schema 1"),
        (b'{"schema": 1}', "invalid model description"),
    ],
)
def test_a_description_that_cannot_be_read_is_named(data: bytes, message: str) -> None:
    with pytest.raises(UnreadableModel, match=f"model.json: .*{message}"):
        description_from_json(data, where="model.json")


def test_duplicate_class_names_are_refused() -> None:
    with pytest.raises(ValidationError, match="duplicate class names: \\['a'\\]"):
        _description(heads=main_head(("a", "b", "a")))


def test_an_image_size_that_the_architecture_cannot_take_is_refused() -> None:
    with pytest.raises(ValidationError, match="image_size=224 of vit must equal image_size=16"):
        _description(architecture=VitConfig())


def test_weights_are_the_same_bytes_each_time_and_come_back() -> None:
    classifier = _classifier(_description())
    data = weights_to_bytes(classifier)
    again = _classifier(_description(), seed=5)
    assert weights_to_bytes(again) != data
    again.load_state_dict(weights_from_bytes(data))
    assert weights_to_bytes(again) == data


def test_cut_weights_are_an_error_that_says_so() -> None:
    data = weights_to_bytes(_classifier(_description()))
    with pytest.raises(UnreadableModel, match="not a whole safetensors file"):
        weights_from_bytes(data[:-10])


def test_weights_of_another_architecture_are_refused() -> None:
    weights = weights_from_bytes(weights_to_bytes(_classifier(_description())))
    with pytest.raises(UnreadableModel, match="do not fit"):
        model_from_weights(_description(architecture=SmallCnnConfig(width=8)), weights)


def test_damaged_weights_are_found_by_their_checksum(tmp_path: Path) -> None:
    save_model(tmp_path, _classifier(_description()), _description())
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UnreadableModel, match="sha256"):
        load_model(tmp_path)


def test_a_model_is_never_overwritten(tmp_path: Path) -> None:
    save_model(tmp_path, _classifier(_description()), _description())
    with pytest.raises(FileExistsError, match="holds a model already"):
        save_model(tmp_path, _classifier(_description()), _description())


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="selftrain export"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 17, 16),
        torch.zeros(3, 16, 16),
        np.zeros((1, 3, 16, 16), np.uint8),
        torch.zeros(1, 3, 16, 16, dtype=torch.int64),
    ],
)
def test_images_of_another_shape_or_type_are_refused(tmp_path: Path, images: Any) -> None:
    save_model(tmp_path, _classifier(_description()), _description())
    with pytest.raises(ValueError, match="images must be"):
        load_model(tmp_path).predict(images)


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    save_model(tmp_path, _classifier(_description()), _description())
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_model(tmp_path)
    assert torch.equal(torch.rand(1), expected)
