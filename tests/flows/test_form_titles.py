"""The form that Prefect makes of a config: what its tabs and fields are called."""

from collections.abc import Iterator
from typing import Any

from prefect.utilities.callables import parameter_schema

from flows.approving import approve
from flows.self_training import self_training


def form_of(flow: Any) -> dict[str, Any]:
    """The schema that a deployment is given, of which the UI makes the form."""
    return parameter_schema(flow).model_dump()


def fields(form: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for model, schema in form["definitions"].items():
        for name, field in schema.get("properties", {}).items():
            yield f"{model}.{name}", field


def test_the_choices_of_a_union_are_called_as_a_config_calls_them() -> None:
    definitions = form_of(self_training)["definitions"]

    def choices(model: str, field: str) -> list[str]:
        refs = definitions[model]["properties"][field]["oneOf"]
        return [definitions[one["$ref"].rpartition("/")[2]]["title"] for one in refs]

    assert choices("SelfTrainingConfig", "data") == ["shards", "digits"]
    assert choices("SelfTrainingConfig", "teacher") == ["train", "given", "latest_promoted"]
    assert choices("StudentConfig", "architecture")[:3] == ["small_cnn", "wide_resnet", "resnet"]
    # The form shows all in one line, which must not be wider than the page.
    for model, schema in definitions.items():
        for name, field in schema.get("properties", {}).items():
            if "oneOf" in field:
                assert sum(len(one) + 4 for one in choices(model, name)) < 160, f"{model}.{name}"
    assert definitions["AffineConfig"]["title"] == "Affine"
    assert definitions["SelfTrainingConfig"]["title"] == "SelfTraining"


def test_every_field_has_a_title_and_says_what_it_is() -> None:
    all_fields = [*fields(form_of(self_training)), *fields(form_of(approve))]

    assert len(all_fields) > 300
    assert [name for name, field in all_fields if "title" not in field] == []
    assert [name for name, field in all_fields if not field.get("description")] == []
