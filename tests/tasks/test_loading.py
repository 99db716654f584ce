"""Options of reading: they reach the worker and change no fingerprint."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from storage.shard_cache import CacheConfig
from tasks.loading import PLAIN_LOADING, LoadingConfig
from tasks.training_orders import place_order, read_order


def test_an_order_carries_the_options_to_whoever_trains(lab, tmp_path):
    cache = CacheConfig(dir=str(tmp_path / "cache"), max_bytes=2**30)
    loading = LoadingConfig(cache=cache, loader_threads=3, materialize="never")
    order = replace(lab.order(), loading=loading)
    place_order(lab.store, order)
    found = read_order(lab.store, order.specification.fingerprint)
    assert found.loading == loading
    assert lab.order().loading == PLAIN_LOADING
    assert found.specification.fingerprint == lab.order().specification.fingerprint


def test_a_model_is_the_same_with_a_cache_and_other_threads(lab, tmp_path):
    plain = lab.train()
    other = lab.in_store(tmp_path / "other")
    cache = CacheConfig(dir=str(tmp_path / "cache"), max_bytes=2**30)
    loading = LoadingConfig(cache=cache, loader_threads=1)
    cached = other.train(replace(other.order(), loading=loading))
    assert cached.object("model").sha256 == plain.object("model").sha256
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len(lab.labeled.shards)


@pytest.mark.parametrize(
    "options",
    [
        {"loader_threads": 0},
        {"cache": {"dir": "", "max_bytes": 1}},
        {"cache": {"dir": "/tmp", "max_bytes": 0}},
        {"cache": {"dir": "/tmp"}},
        {"materialize": "sometimes"},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError):
        LoadingConfig.model_validate(options)
