"""Tests of the one image conversion and of the views, on images made here."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from tasks import images
from tasks.images import (
    BadImage,
    clean_view,
    decode_any_image,
    decode_image,
    image_kind,
    largest_reduction,
    random_resized_view,
    upright_size,
)

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data):
    image = decode_image(data, where="s/0")
    assert image.mode == "RGB"
    return np.asarray(image)


def gradient(mode="RGB", size=(24, 16)):
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x * 10, y * 15, (x + y) * 6], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_plain_rgb_comes_back_unchanged_in_png_and_lossless_webp():
    expected = np.asarray(gradient())
    np.testing.assert_array_equal(decoded(encoded(gradient())), expected)
    np.testing.assert_array_equal(decoded(encoded(gradient(), "WEBP", lossless=True)), expected)


def test_memoryview_into_a_shard_is_decoded():
    data = encoded(gradient())
    np.testing.assert_array_equal(decoded(memoryview(b"xx" + data)[2:]), np.asarray(gradient()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    # A white image whose upright top-left quarter is red and top-right quarter blue.
    upright = np.full((32, 48, 3), 255, np.uint8)
    upright[:16, :24], upright[:16, 24:] = RED, BLUE
    # How a camera stores it, so that the viewer's correction gives the upright one back.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decoded(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif))
    assert found.shape == (32, 48, 3)
    for y, x in ((4, 4), (4, 44), (28, 4), (28, 44)):
        np.testing.assert_allclose(found[y, x].astype(int), upright[y, x].astype(int), atol=12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_block_does_not_cost_the_image():
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert decoded(data).shape == (16, 24, 3)


def test_cmyk_jpeg_becomes_rgb_not_its_negative():
    for colour in (RED, BLUE, WHITE, (0, 0, 0)):
        image = Image.new("RGB", (16, 16), colour).convert("CMYK")
        found = decoded(encoded(image, "JPEG", quality=95))
        np.testing.assert_allclose(found[8, 8].astype(int), colour, atol=6)


def test_grey_becomes_three_equal_channels():
    found = decoded(encoded(gradient("L")))
    np.testing.assert_array_equal(found, np.repeat(np.asarray(gradient("L"))[..., None], 3, axis=2))
    assert decoded(encoded(gradient("L"), "JPEG")).shape == (16, 24, 3)


def test_black_and_white_is_0_and_255():
    found = decoded(encoded(gradient("1")))
    assert set(np.unique(found)) == {0, 255}


def test_palette_is_looked_up():
    image = gradient().quantize(16)
    np.testing.assert_array_equal(decoded(encoded(image)), np.asarray(image.convert("RGB")))


def palette_image():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    return image


def test_transparent_palette_entry_becomes_white():
    found = decoded(encoded(palette_image(), transparency=0))
    assert tuple(found[0, 0]) == WHITE
    assert tuple(found[0, 1]) == BLUE


def test_half_transparent_palette_entry_is_laid_over_white():
    found = decoded(encoded(palette_image(), transparency=bytes([128, 255])))
    # Red at 128/255 over white: green and blue are 255 * (1 - 128/255) = 127.
    np.testing.assert_allclose(found[0, 0].astype(int), (255, 127, 127), atol=1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_laid_over_white(kind):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[0, :, 3], pixels[1, :, 3], pixels[2:, :, 3] = 0, 51, 255
    found = decoded(encoded(Image.fromarray(pixels), kind, lossless=True))
    assert tuple(found[0, 0]) == WHITE
    # 51/255 = 0.2: green and blue are 255 * 0.8 = 204.
    np.testing.assert_allclose(found[1, 0].astype(int), (255, 204, 204), atol=1)
    assert tuple(found[3, 0]) == RED


def test_grey_with_alpha_is_laid_over_white():
    pixels = np.zeros((2, 2, 2), np.uint8)
    pixels[0, :, 1], pixels[1, :, 1] = 0, 255
    found = decoded(encoded(Image.fromarray(pixels, "LA")))
    assert tuple(found[0, 0]) == WHITE
    assert tuple(found[1, 0]) == (0, 0, 0)


@pytest.mark.parametrize(("mode", "colour"), [("RGB", RED), ("L", 76)])
def test_one_transparent_colour_of_a_png_becomes_white(mode, colour):
    image = Image.new(mode, (2, 2), colour)
    image.putpixel((1, 1), 0 if mode == "L" else (0, 0, 0))
    found = decoded(encoded(image, transparency=colour))
    assert tuple(found[0, 0]) == WHITE
    assert tuple(found[1, 1]) == (0, 0, 0)


def test_16_bit_grey_is_scaled_not_cut():
    values = np.array([[0, 128, 129, 257, 32896, 65278, 65406, 65407, 65535]], np.uint16)
    found = decoded(encoded(Image.fromarray(values)))
    # v / 257, rounded: 128/257 = .498, 129/257 = .502, 65406/257 = 254.498, 65407/257 = 254.502.
    assert found[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 254, 255, 255]
    np.testing.assert_array_equal(found[..., 0], found[..., 2])


def png_of(width, height, depth, colour_type, rows):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_16_bit_rgb_png_keeps_its_brightness():
    values = [0, 65535, 32896]
    found = decoded(png_of(1, 1, 16, 2, b"\0" + struct.pack(">3H", *values)))
    assert tuple(found[0, 0]) == (0, 255, 128)


def test_truncated_jpeg_is_refused_naming_where():
    data = encoded(gradient(size=(200, 200)), "JPEG")
    with pytest.raises(BadImage, match=r"^s/0: cannot be decoded"):
        decode_image(data[: len(data) // 2], where="s/0")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_truncated_png_and_webp_are_refused(kind):
    data = encoded(gradient(size=(64, 64)), kind)
    with pytest.raises(BadImage, match="s/0"):
        decode_image(data[: len(data) // 2], where="s/0")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        encoded(gradient(), "GIF"),
        encoded(gradient(), "BMP"),
        encoded(gradient(), "TIFF"),
    ],
)
def test_other_formats_are_refused_whatever_they_are_called(data):
    with pytest.raises(BadImage, match="s/0: not a readable image of JPEG, PNG, WEBP"):
        decode_image(data, where="s/0")


def test_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    bomb = png_of(8001, 8000, 8, 2, b"\0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match="8001 x 8000 pixels; the limit is 64000000"):
            decode_image(bomb, where="s/0")
    with pytest.raises(BadImage, match="s/0"):
        decode_image(png_of(40_000, 40_000, 8, 2, b"\0"), where="s/0")


def test_any_damage_is_a_bad_image_or_decodes_to_rgb():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = encoded(gradient(), kind)
        for _ in range(60):
            data = bytearray(whole)
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            try:
                assert decode_image(bytes(data), where="s/0").mode == "RGB"
            except BadImage as error:
                assert str(error).startswith("s/0")  # noqa: PT017


def test_making_shards_decodes_other_formats_too():
    for kind in ("GIF", "BMP", "TIFF", "PPM"):
        assert decode_any_image(encoded(gradient(), kind), where="x").size == (24, 16)
    with pytest.raises(BadImage):
        decode_any_image(b"%!PS-Adobe", where="x")


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), c) for c in (RED, BLUE)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert tuple(decoded(data)[0, 0]) == RED


def test_kind_is_told_by_content():
    assert image_kind(encoded(gradient(), "JPEG")) == "jpg"
    assert image_kind(encoded(gradient(), "PNG")) == "png"
    assert image_kind(encoded(gradient(), "WEBP")) == "webp"
    assert image_kind(encoded(gradient(), "GIF")) is None
    assert image_kind(b"") is None


def test_clean_view_of_an_image_of_that_size_is_the_image():
    image = gradient(size=(32, 32))
    np.testing.assert_array_equal(clean_view(image, 32), np.asarray(image))


def test_clean_view_cuts_the_central_square():
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 200
    np.testing.assert_array_equal(clean_view(Image.fromarray(pixels), 32), pixels[:, 32:64])
    view = clean_view(Image.fromarray(pixels), 16, interpolation="bilinear")
    assert view.shape == (16, 16, 3)
    assert view.dtype == np.uint8


def test_crop_padding_cuts_a_margin_off():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[8:56, 8:56] = 255
    # Side 64 * 48 / (48 + 16) = 48, centred: exactly the white part.
    assert (clean_view(Image.fromarray(pixels), 48, crop_padding=16) == 255).all()
    assert not (clean_view(Image.fromarray(pixels), 48) == 255).all()


def test_clean_view_makes_small_images_larger():
    assert clean_view(gradient(size=(8, 8)), 16).shape == (16, 16, 3)


def test_given_box_is_cut_and_resized():
    pixels = np.asarray(gradient(size=(24, 16)))
    view = random_resized_view(Image.fromarray(pixels), 8, (3, 2, 11, 10))
    np.testing.assert_array_equal(view, pixels[2:10, 3:11])
    assert random_resized_view(Image.fromarray(pixels), 5, (0.5, 1, 20.5, 13)).shape == (5, 5, 3)


@pytest.mark.parametrize("box", [(0, 0, 25, 8), (-1, 0, 8, 8), (4, 0, 4, 8), (0, 9, 8, 8)])
def test_box_outside_the_image_is_refused(box):
    with pytest.raises(ValueError, match="is empty or leaves the image"):
        random_resized_view(gradient(size=(24, 16)), 8, box)


def test_unknown_interpolation_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"there are .*bicubic"):
        clean_view(gradient(), 8, interpolation="cubic")  # type: ignore[arg-type]


def test_name_of_the_conversion_is_in_stored_fingerprints():
    assert images.CONVERSION == "turbo-torch-1"


@pytest.mark.parametrize(
    ("sides", "size", "expected"),
    [
        ((224, 500), 224, 1),
        ((447, 500), 224, 1),  # half of 447 is 223: too small
        ((448, 500), 224, 2),
        ((900, 1791), 224, 4),
        ((1792, 1792), 224, 8),
        ((9000, 9000), 224, 8),  # libjpeg scales by at most 8
    ],
)
def test_the_reduction_leaves_at_least_the_size(sides, size, expected):
    width, height = sides
    assert largest_reduction(width, height, size) == expected


@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_decoded_at_a_part_of_its_sides(divisor, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation  # 6: stored lying on its side
    y, x = np.mgrid[:97, :131]
    smooth = np.stack([x, y * 2, x + y], axis=-1).astype(np.uint8)
    data = encoded(Image.fromarray(smooth), "JPEG", exif=exif, quality=95)
    upright = (131, 97) if orientation == 1 else (97, 131)
    asked = []

    def reduction(width, height):
        asked.append((width, height))
        return divisor

    image = decode_image(data, where="s/0", reduction=reduction)
    assert upright_size(data, where="s/0") == upright
    assert set(asked) == {upright}
    assert image.size == tuple(-(-side // divisor) for side in upright)
    # The same picture: it differs little from the whole one made smaller.
    whole = decode_image(data, where="s/0").resize(image.size, Image.Resampling.BOX)
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(whole))
    assert float(difference.mean()) < 6
    assert (difference.max() == 0) == (divisor == 1)


def test_other_formats_are_decoded_whole():
    data = encoded(gradient(size=(64, 64)))
    image = decode_image(data, where="s/0", reduction=lambda width, height: 8)
    np.testing.assert_array_equal(np.asarray(image), decoded(data))


def test_the_size_of_a_file_that_is_no_image_cannot_be_told():
    with pytest.raises(BadImage, match=r"s/0: not a readable image"):
        upright_size(b"not an image", where="s/0")
