"""The fast path of images: Pillow's pixels without Pillow, torchvision's view without its time."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from tasks import images
from tasks.images import BadImage, clean_view, decode_pixels
from tasks.jpeg_files import plain_pixels, plain_size

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample-400.tar"


def picture(width, height, seed=0):
    """Smooth shapes and some noise, so that JPEG has something to do."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)


def jpeg(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def pillows(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def torchvisions(pixels, size, padding, interpolation="bilinear"):
    """Resize and CenterCrop as torchvision's own transforms of its weights do, on uint8 tensors."""
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    mode = InterpolationMode(interpolation)
    resized = reference.resize(image, [size + padding], interpolation=mode, antialias=True)
    return reference.center_crop(resized, [size, size]).permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def photographs():
    if not PHOTOGRAPHS.exists():
        pytest.skip(f"needs {PHOTOGRAPHS.name} beside the project")
    with tarfile.open(PHOTOGRAPHS) as tar:
        files = [tar.extractfile(member) for member in tar if member.isfile()]
        return [file.read() for file in files[::8] if file is not None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 30},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2, "restart_marker_rows": 1},
        {"keep_rgb": True},
        {"optimize": True, "comment": b"a comment"},
    ],
)
@pytest.mark.parametrize("sides", [(64, 48), (33, 71), (1, 1)])
def test_plain_jpegs_are_decoded_to_pillows_pixels_without_it(options, sides, monkeypatch):
    data = jpeg(picture(*sides), **options)
    expected = pillows(data)
    monkeypatch.setattr(images, "_decode", None)
    assert plain_size(data) == (sides, False)
    np.testing.assert_array_equal(decode_pixels(memoryview(data), where="s/0"), expected)


def test_grey_jpegs_are_decoded_to_three_equal_channels_without_pillow(monkeypatch):
    data = jpeg(picture(40, 30)[..., 0])
    expected = pillows(data)
    monkeypatch.setattr(images, "_decode", None)
    np.testing.assert_array_equal(decode_pixels(data, where="s/0"), expected)


def test_metadata_that_turn_nothing_leave_a_jpeg_plain(monkeypatch):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "a camera"
    data = jpeg(picture(40, 30), exif=exif)
    expected = pillows(data)
    monkeypatch.setattr(images, "_decode", None)
    assert plain_size(data) == ((40, 30), True)
    np.testing.assert_array_equal(decode_pixels(data, where="s/0"), expected)


def test_an_orientation_in_xmp_alone_turns_the_image_as_pillow_does():
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="rdf">'
        b'<rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    data = jpeg(picture(40, 30), xmp=xmp)
    assert decode_pixels(data, where="s/0").shape == (40, 30, 3)
    np.testing.assert_array_equal(
        decode_pixels(data, where="s/0"),
        np.asarray(Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_270)),
    )


def test_what_is_not_a_plain_jpeg_is_left_to_pillow():
    cmyk = Image.fromarray(picture(20, 20)).convert("CMYK")
    buffer = io.BytesIO()
    cmyk.save(buffer, "JPEG")
    png = io.BytesIO()
    Image.fromarray(picture(20, 20)).save(png, "PNG")
    whole = jpeg(picture(20, 20))
    for data in (buffer.getvalue(), png.getvalue(), b"", b"\xff\xd8", whole[:20], b"\xff\xd8" * 40):
        assert plain_size(data) is None


def test_a_jpeg_that_libjpeg_warns_of_is_decoded_as_pillow_decodes_it():
    data = jpeg(picture(64, 64), quality=95)
    start = data.index(b"\xff\xda") + 200
    damaged = data[:start] + b"\xff\x00\x13\x37\xff\x00" * 4 + data[start + 24 :]
    assert plain_pixels(damaged) is None
    np.testing.assert_array_equal(decode_pixels(damaged, where="s/0"), pillows(damaged))


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.98])
def test_a_cut_jpeg_is_refused_as_before(kept):
    data = jpeg(picture(64, 64))
    with pytest.raises(BadImage, match=r"^s/0: cannot be decoded: OSError: .*[Tt]runcated"):
        decode_pixels(data[: int(len(data) * kept)], where="s/0")


def test_a_jpeg_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 30 - 1)
    with pytest.raises(BadImage, match="s/0: 40 x 30 pixels; the limit is 1199"):
        decode_pixels(jpeg(picture(40, 30)), where="s/0")


@pytest.mark.parametrize(
    "sides", [(97, 131), (131, 97), (64, 64), (65, 64), (250, 80), (80, 250), (40, 56), (500, 375)]
)
@pytest.mark.parametrize("padding", [0, 32])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_clean_view_is_torchvisions(sides, padding, interpolation):
    pixels = picture(*sides)
    expected = torchvisions(pixels, 64, padding, interpolation)
    found = clean_view(pixels, 64, padding, interpolation)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        clean_view(Image.fromarray(pixels), 64, padding, interpolation), expected
    )


@pytest.mark.parametrize("sides", [(1200, 20), (20, 1201), (4000, 1), (3, 2000)])
def test_the_ends_of_very_long_images_are_not_resized_and_the_view_stays(sides, monkeypatch):
    pixels = picture(*sides)
    resized = []

    def noting(self, *arguments, **options):
        resized.append(self.shape)
        return interpolate(self, *arguments, **options)

    interpolate = torch.nn.functional.interpolate
    expected = torchvisions(pixels, 64, 0)
    monkeypatch.setattr(torch.nn.functional, "interpolate", noting)
    found = clean_view(pixels, 64, 0, "bilinear")
    assert max(resized[0]) <= 4 * min(sides) + 1
    # A whole number of columns of the resized image is not one of the original: a part of a pixel.
    assert float(np.abs(found.astype(int) - expected).mean()) < 12


def test_pixels_of_the_photographs_are_pillows_and_their_views_torchvisions(photographs):
    differences = []
    for number, data in enumerate(photographs):
        pixels = decode_pixels(data, where=str(number))
        np.testing.assert_array_equal(pixels, pillows(data))
        view = clean_view(pixels, 224, 32, "bilinear")
        expected = torchvisions(pillows(data), 224, 32)
        differences.append(float(np.abs(view.astype(int) - expected).mean()))
    assert max(differences) <= 1  # of 255
