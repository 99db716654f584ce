"""Weights that a training starts from."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models._api import WeightsEnum

from models.architectures import (
    AirbenchConfig,
    Classifier,
    EfficientNetConfig,
    MobileNetV3Config,
    Normalization,
    ResNetConfig,
    SmallCnnConfig,
    VitConfig,
    WideResNetConfig,
    build_architecture,
    build_classifier,
    vision_transformer,
)
from models.description import UnreadableModel, weights_from_bytes
from storage.manifest import read_stored
from storage.store import CorruptObject, Store, open_store
from tasks.classifiers import UnknownModel, read_description
from tasks.importing import import_model
from tasks.initial_weights import (
    WeightsMismatch,
    WeightsUnavailable,
    initial_weights_path,
    initialise_from_model,
    initialise_from_weights,
    store_initial_weights,
)

NET = SmallCnnConfig(width=2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def fresh(config: Any = NET, num_classes: int = 3, seed: int = 1) -> Classifier:
    torch.manual_seed(seed)
    return build_classifier(config, num_classes, Normalization())


def network_weights(config: Any = NET, num_classes: int = 3, seed: int = 7) -> dict[str, Tensor]:
    """Weights as another project would save them, under the network's own names."""
    torch.manual_seed(seed)
    return build_architecture(config, num_classes).state_dict()


def written(path: Path, weights: Mapping[str, Tensor]) -> str:
    """Write weights in the form that the path's ending names."""
    if path.suffix == ".safetensors":
        save_file(dict(weights), path)
    else:
        torch.save(dict(weights), path)
    return str(path)


def same(model: Classifier, weights: Mapping[str, Tensor], *, but: str | None = None) -> bool:
    ours = model.backbone.state_dict()
    names = [name for name in weights if but is None or not name.startswith(but)]
    return all(torch.equal(ours[name], weights[name]) for name in names)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_weights_are_stored_under_their_checksum_and_loaded(store, tmp_path, name):
    weights = network_weights()
    sha256 = store_initial_weights(store, written(tmp_path / name, weights), NET)
    data = store.read(f"initial_weights/{sha256}.safetensors")
    assert hashlib.sha256(data).hexdigest() == sha256
    assert set(weights_from_bytes(data)) == {f"backbone.{name}" for name in weights}
    model = fresh()
    assert not same(model, weights)
    done = initialise_from_weights(store, sha256, model)
    assert same(model, weights)
    assert (done.num_loaded, done.head) == (len(weights) - 2, 3)
    assert done.source == initial_weights_path(sha256)


def test_the_checksum_is_that_of_the_weights_and_not_of_the_file(store, tmp_path):
    weights = network_weights()
    parallel = {f"module.{name}": tensor for name, tensor in weights.items()}
    nested: Any = {"state_dict": parallel, "epoch": torch.tensor(3)}
    sources = [
        written(tmp_path / "a.safetensors", weights),
        written(tmp_path / "b.pth", parallel),
        written(tmp_path / "c.pth", nested),
    ]
    names = {store_initial_weights(store, source, NET) for source in sources}
    assert len(names) == 1
    other = written(tmp_path / "d.pth", network_weights(seed=8))
    assert store_initial_weights(store, other, NET) not in names


def test_another_number_of_classes_keeps_the_fresh_head(store, tmp_path):
    weights = network_weights(num_classes=5)
    sha256 = store_initial_weights(store, written(tmp_path / "w.pth", weights), NET)
    model = fresh()
    head = {name: t.clone() for name, t in model.backbone.state_dict().items() if "fc" in name}
    done = initialise_from_weights(store, sha256, model)
    assert same(model, weights, but="fc.")
    assert same(model, head)
    assert done.head == 0


def test_a_file_without_a_head_will_do(store, tmp_path):
    weights = {n: t for n, t in network_weights().items() if not n.startswith("fc.")}
    sha256 = store_initial_weights(store, written(tmp_path / "w.pth", weights), NET)
    assert initialise_from_weights(store, sha256, model := fresh()).head == 0
    assert same(model, weights)


def test_a_head_of_another_form_is_left_out_whole(store, tmp_path):
    weights = network_weights()
    del weights["fc.bias"]
    sha256 = store_initial_weights(store, written(tmp_path / "w.pth", weights), NET)
    model = fresh()
    own = {n: t.clone() for n, t in model.backbone.state_dict().items() if "fc" in n}
    assert initialise_from_weights(store, sha256, model).head == 0
    assert same(model, own)


def test_weights_older_than_batchnorms_counter_will_do(store, tmp_path):
    weights = {n: t for n, t in network_weights().items() if "num_batches" not in n}
    sha256 = store_initial_weights(store, written(tmp_path / "w.pth", weights), NET)
    initialise_from_weights(store, sha256, model := fresh())
    assert same(model, weights)


def test_other_weights_are_refused_naming_what_is_missing_unexpected_and_of_another_shape(
    store, tmp_path
):
    weights = network_weights()
    weights["extra.weight"] = weights.pop("features.0.weight")
    weights["features.1.bias"] = torch.zeros(9)
    with pytest.raises(WeightsMismatch) as caught:
        store_initial_weights(store, written(tmp_path / "w.pth", weights), NET)
    message = str(caught.value)
    assert f"{tmp_path}/w.pth does not fit small_cnn-2x1" in message
    assert "missing features.0.weight" in message
    assert "unexpected extra.weight" in message
    assert "of another shape features.1.bias (9,), wanted (2,)" in message
    assert store.list() == []


def test_weights_stored_for_one_architecture_are_not_loaded_into_another(store, tmp_path):
    source = written(tmp_path / "w.pth", network_weights())
    sha256 = store_initial_weights(store, source, NET)
    with pytest.raises(WeightsMismatch, match=r"missing conv\.weight"):
        initialise_from_weights(store, sha256, fresh(WideResNetConfig(depth=10, width=1)))


def test_a_damaged_object_is_never_loaded(store, tmp_path):
    sha256 = store_initial_weights(store, written(tmp_path / "w.pth", network_weights()), NET)
    path = Path(store.url_of(initial_weights_path(sha256)))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CorruptObject, match=sha256):
        initialise_from_weights(store, sha256, fresh())


def test_a_pickle_that_would_run_code_is_refused(store, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(build_architecture(NET, 3), path)
    with pytest.raises(UnreadableModel, match="cannot run"):
        store_initial_weights(store, str(path), NET)


def test_a_file_that_is_not_there_is_named(store, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        store_initial_weights(store, str(tmp_path / "nowhere.pth"), NET)


@pytest.mark.parametrize(
    "config",
    [
        ResNetConfig(name="resnet18"),
        EfficientNetConfig(name="b0"),
        MobileNetV3Config(name="small"),  # two linear layers: only the second is the head
        AirbenchConfig(widths=(4, 4, 4)),  # a head without bias
        WideResNetConfig(depth=10, width=1, norm="group"),
    ],
    ids=lambda config: config.kind,
)
def test_every_family_has_one_head(store, tmp_path, config):
    weights = network_weights(config, 4)
    sha256 = store_initial_weights(store, written(tmp_path / "w.safetensors", weights), config)
    model = fresh(config, 3)
    heads = [n for n, t in model.backbone.state_dict().items() if t.shape != weights[n].shape]
    done = initialise_from_weights(store, sha256, model)
    assert same(model, {n: t for n, t in weights.items() if n not in heads})
    assert done.num_loaded == len(weights) - len(heads)
    assert initialise_from_weights(store, sha256, fresh(config, 4)).head == 4


def test_a_transformers_positions_are_fitted_to_the_image_size(store, tmp_path, monkeypatch):
    # One block of width 8: (patch, layers, heads, width, width within the block).
    monkeypatch.setitem(vision_transformer._PUBLISHED, "b_32", (32, 1, 2, 8, 16))
    small, large = (VitConfig(name="b_32", image_size=size) for size in (64, 96))
    weights = network_weights(small)
    # The class token's -7; the patches (y, x) of a 2x2 grid hold 10 y + x.
    positions = torch.tensor([-7.0, 0.0, 1.0, 10.0, 11.0]).view(1, 5, 1).expand(1, 5, 8)
    weights["encoder.pos_embedding"] = positions.contiguous()
    source = written(tmp_path / "w.pth", weights)
    sha256 = store_initial_weights(store, source, large)
    assert sha256 == store_initial_weights(store, source, small)
    initialise_from_weights(store, sha256, model := fresh(large))
    found = model.backbone.state_dict()["encoder.pos_embedding"][0, :, 5]
    expected = [-7.0, 0.0, 0.5, 1.0, 5.0, 5.5, 6.0, 10.0, 10.5, 11.0]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    weights.pop("encoder.pos_embedding")
    assert same(model, weights)


def imported(store: Store, path: Path, names: list[str]) -> tuple[str, dict[str, Tensor]]:
    weights = network_weights(num_classes=len(names))
    url = import_model(
        store,
        written(path, weights),
        architecture="{kind: small_cnn, width: 2}",
        class_names=names,
        image_size=8,
    )
    return url.rpartition("/")[2], weights


def test_a_stored_models_classes_are_matched_by_name(store, tmp_path):
    fingerprint, weights = imported(store, tmp_path / "w.pth", ["ant", "bee", "cat", "dog"])
    model = fresh()
    own = {name: t.clone() for name, t in model.backbone.state_dict().items()}
    done = initialise_from_model(store, fingerprint, model, ["dog", "eel", "ant"])
    assert same(model, weights, but="fc.")
    head = model.backbone.state_dict()
    for name in ("fc.weight", "fc.bias"):
        # dog is row 3 of the stored head, ant row 0; eel is new. By position it would be ant, bee
        # and cat.
        assert torch.equal(head[name][0], weights[name][3])
        assert torch.equal(head[name][1], own[name][1])
        assert torch.equal(head[name][2], weights[name][0])
    assert done.head == 2
    assert done.source.startswith(f"models/{fingerprint}/model-")


def test_a_model_of_the_same_classes_is_taken_over_whole(store, tmp_path):
    fingerprint, weights = imported(store, tmp_path / "w.pth", ["ant", "bee", "cat"])
    model = fresh()
    assert initialise_from_model(store, fingerprint, model, ["ant", "bee", "cat"]).head == 3
    assert same(model, weights)


@pytest.mark.parametrize(
    ("config", "architecture", "expected"),
    # As computed before wide_resnet had `norm` and efficientnet `batch_norm_eps`.
    [
        (
            WideResNetConfig(depth=10, width=1),
            "{kind: wide_resnet, depth: 10, width: 1}",
            "2ec7fd669437e14732113064e9266e4102c22dfbadab33acf898022a051b372b",
        ),
        (
            EfficientNetConfig(),
            "{kind: efficientnet}",
            "dde10e4a993be5e9738cbe441948f011987dd9d754b3e21967c1ef74938cfba7",
        ),
    ],
    ids=["wide_resnet", "efficientnet"],
)
def test_imported_models_keep_their_fingerprints_when_an_architecture_learns_an_option(
    store, tmp_path, config, architecture, expected
):
    weights = network_weights(config, 2)
    ones = {n: torch.ones(t.shape, dtype=t.dtype) for n, t in weights.items()}
    source = written(tmp_path / "w.pth", ones)
    url = import_model(
        store, source, architecture=architecture, class_names=["a", "b"], image_size=32
    )
    assert url.endswith(f"/{expected}")


def test_an_unknown_model_is_named(store):
    with pytest.raises(UnknownModel, match="no finished model"):
        initialise_from_model(store, "0" * 64, fresh(), ["a", "b", "c"])


def test_a_trained_model_of_a_run_can_be_gone_on_from(pipeline):
    store, teacher = pipeline.lab.store, pipeline.teacher
    weights = weights_from_bytes(read_stored(store, teacher.object("model")))
    model = fresh(read_description(store, teacher.fingerprint).architecture)
    initialise_from_model(store, teacher.fingerprint, model, ["red", "green", "blue"])
    assert all(torch.equal(model.state_dict()[n], t) for n, t in weights.items())


@pytest.mark.parametrize(
    "name",
    ["IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1", "ResNet18_Weights.DEFAULT"],
)
def test_torchvisions_weights_have_several_names(store, monkeypatch, name):
    asked: list[tuple[str, dict[str, Any]]] = []
    weights = network_weights(ResNetConfig(name="resnet18"), 1000)

    def download(self: WeightsEnum, **options: Any) -> dict[str, Tensor]:
        asked.append((str(self), options))
        return weights

    monkeypatch.setattr(WeightsEnum, "get_state_dict", download)
    config = ResNetConfig(name="resnet18")
    sha256 = store_initial_weights(store, f"torchvision:{name}", config)
    expected = {"progress": False, "check_hash": True, "weights_only": True}
    assert asked == [("ResNet18_Weights.IMAGENET1K_V1", expected)]
    initialise_from_weights(store, sha256, model := fresh(config))
    assert same(model, weights, but="fc.")


def test_without_a_network_the_url_and_the_remedy_are_named(store, monkeypatch, tmp_path):
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsUnavailable) as caught:
        store_initial_weights(store, "torchvision:DEFAULT", ResNetConfig(name="resnet18"))
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    assert f"cannot download {url}: <urlopen error no route to host>" in str(caught.value)
    assert "name its path" in str(caught.value)


def test_unknown_names_of_torchvision_list_the_known_ones(store):
    with pytest.raises(WeightsUnavailable) as caught:
        store_initial_weights(store, "torchvision:IMAGENET21K", ResNetConfig(name="resnet50"))
    assert "known: torchvision:ResNet50_Weights.IMAGENET1K_V1, torchvision:" in str(caught.value)
    other = "torchvision:ResNet50_Weights.DEFAULT"
    with pytest.raises(WeightsUnavailable, match="unknown weights for resnet18"):
        store_initial_weights(store, other, ResNetConfig(name="resnet18"))
    with pytest.raises(WeightsUnavailable, match=r"has no weights for small_cnn-2x1; name a file"):
        store_initial_weights(store, "torchvision:DEFAULT", NET)
