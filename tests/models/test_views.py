"""The geometry of views: what each kind cuts out, and what random views depend on."""

import pytest
from pydantic import TypeAdapter, ValidationError

from models.architectures import SmallCnnConfig, VitConfig
from models.views import (
    CleanViewConfig,
    FiveCropViewConfig,
    HflipViewConfig,
    KRandomViewConfig,
    MultiScaleViewConfig,
    View,
    ViewConfig,
    check_views,
    view_sizes,
    views_of,
)
from storage.addresses import settings_of

KINDS: list[ViewConfig] = [
    CleanViewConfig(),
    HflipViewConfig(),
    MultiScaleViewConfig(),
    MultiScaleViewConfig(scales=(1.0, 2.0), flip=False),
    FiveCropViewConfig(),
    KRandomViewConfig(k=3),
]


def views(
    config: ViewConfig,
    *,
    width: int = 40,
    height: int = 20,
    size: int = 16,
    crop_padding: int = 4,
    stream: int = 7,
    key: str = "cat",
) -> tuple[View, ...]:
    return views_of(
        config,
        width=width,
        height=height,
        size=size,
        crop_padding=crop_padding,
        stream=stream,
        key=key,
    )


def test_the_clean_view_is_the_networks_own():
    assert views(CleanViewConfig()) == (View(16, None, 4, False),)


def test_hflip_adds_the_mirror_image():
    assert views(HflipViewConfig()) == (View(16, None, 4, False), View(16, None, 4, True))


def test_scales_change_the_size_and_not_the_part_of_the_image():
    # A padding of 4 to 16 pixels is one of 2 to 8 and of 6 to 24: 4/5 of the shorter side always.
    assert views(MultiScaleViewConfig(scales=(0.5, 1.5), flip=True)) == (
        View(8, None, 2, False),
        View(8, None, 2, True),
        View(24, None, 6, False),
        View(24, None, 6, True),
    )


def test_the_order_of_scales_means_nothing():
    one, other = MultiScaleViewConfig(scales=(2.0, 0.5)), MultiScaleViewConfig(scales=(0.5, 2.0))
    assert views(one) == views(other)
    assert settings_of(one) == settings_of(other)


def test_five_crops_lie_in_the_corners_and_the_centre():
    # Side 0.5 * 20 = 10 in 40 x 20.
    found = views(FiveCropViewConfig(fraction=0.5))
    assert [view.box for view in found] == [
        (0, 0, 10, 10),
        (30, 0, 40, 10),
        (0, 10, 10, 20),
        (30, 10, 40, 20),
        (15, 5, 25, 15),
    ]


@pytest.mark.parametrize("config", KINDS, ids=lambda c: c.kind)
@pytest.mark.parametrize(("width", "height"), [(40, 20), (7, 33), (8, 8)])
def test_views_lie_in_the_image_and_have_the_sizes_that_are_announced(
    config: ViewConfig, width: int, height: int
):
    found = views(config, width=width, height=height)
    assert tuple(view.size for view in found) == view_sizes(config, 16)
    for box in (view.box for view in found if view.box is not None):
        left, top, right, bottom = box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_random_views_depend_on_key_and_seed_and_on_nothing_else():
    config = KRandomViewConfig(k=4)
    found = views(config)
    assert views(config) == found
    assert views(config, key="dog") != found
    assert views(config, stream=8) != found
    # More views go on where fewer end.
    assert views(KRandomViewConfig(k=2)) == found[:2]
    assert len(set(found)) == 4


def test_half_of_the_random_views_are_mirrored_where_mirror_images_are_wanted():
    config = KRandomViewConfig(k=8)
    mirrored = [v.is_mirrored for i in range(100) for v in views(config, key=f"{i}")]
    # 800 draws of 1/2: mean 400, standard deviation 14.1; five of them are 71.
    assert abs(sum(mirrored) - 400) < 71
    unflipped = KRandomViewConfig(k=8, flip=False)
    assert not any(v.is_mirrored for i in range(100) for v in views(unflipped, key=f"{i}"))


def test_random_views_have_the_areas_of_the_config():
    config = KRandomViewConfig(k=16, scale=(0.3, 0.5))
    for i in range(20):
        for view in views(config, width=400, height=300, key=f"{i}"):
            assert view.box is not None
            left, top, right, bottom = view.box
            assert 0.29 < (right - left) * (bottom - top) / 120_000 < 0.51


def test_a_network_that_cannot_take_a_scale_is_refused():
    check_views(MultiScaleViewConfig(scales=(0.5, 1.0)), SmallCnnConfig(), 16)
    with pytest.raises(ValueError, match=r"shows images of 4 pixels.*at least 8 pixels"):
        check_views(MultiScaleViewConfig(scales=(0.25, 1.0)), SmallCnnConfig(), 16)
    vit = VitConfig(name="b_16", image_size=224)
    check_views(FiveCropViewConfig(), vit, 224)
    with pytest.raises(ValueError, match="112 pixels to a network made for 224"):
        check_views(MultiScaleViewConfig(scales=(0.5, 1.0)), vit, 224)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "multi_scale", "scales": [1.0, 1.0]}, "must differ"),
        ({"kind": "multi_scale", "scales": [1.0]}, "at least 2"),
        ({"kind": "multi_scale", "scales": [0.0, 1.0]}, "greater than 0"),
        ({"kind": "five_crop", "fraction": 1.0}, "less than 1"),
        ({"kind": "k_random", "scale": [0.5, 0.1]}, "crop.scale"),
        ({"kind": "tta"}, "'clean', 'hflip', 'multi_scale', 'five_crop', 'k_random'"),
    ],
)
def test_views_that_mean_nothing_are_refused(settings: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(ViewConfig).validate_python(settings)
