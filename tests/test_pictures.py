import numpy as np
import pytest
import torch
from PIL import Image

from absynth.data import load_picture
from absynth.errors import InputError
from absynth.pictures import center


def seven() -> np.ndarray:
    """A bold seven, (60, 40) in [0, 1], white on black, with ten pixels of margin."""
    picture = np.zeros((60, 40))
    picture[10:16, 10:30] = 1
    for row in range(16, 50):
        column = round(26 - 12 * (row - 16) / 34)
        picture[row, column - 3 : column + 3] = 1
    return picture


def save(path, array, mode=None):
    Image.fromarray(np.round(array * 255).astype(np.uint8), mode).save(path)
    return path


@pytest.fixture
def expected(tmp_path):
    return load_picture(save(tmp_path / "plain.png", seven()))


def test_a_picture_is_scaled_to_the_box_and_centered_by_mass(expected):
    assert expected.shape == (1, 28, 28) and expected.dtype == torch.float32
    assert expected.min() == 0 and expected.max() == 1
    rows = expected[0].amax(dim=1).nonzero()
    assert rows[-1] - rows[0] + 1 == 20  # the ink is 40 high and 20 wide
    columns = expected[0].amax(dim=0).nonzero()
    assert columns[-1] - columns[0] + 1 == 10
    grid = torch.arange(28.0)
    mass = expected[0].sum()
    assert abs((expected[0].sum(1) * grid).sum() / mass - 14) <= 0.5
    assert abs((expected[0].sum(0) * grid).sum() / mass - 14) <= 0.5


def colored(ink, paper):
    shape = seven()[:, :, None]
    return shape * np.array(ink) + (1 - shape) * np.array(paper)


def test_size_place_and_color_do_not_matter(tmp_path, expected):
    digit = seven()
    wide = np.zeros((150, 300))
    wide[80:140, 5:45] = digit
    pictures = {
        "ink on paper": save(tmp_path / "a.png", 1 - digit),
        "gray paper": save(tmp_path / "b.png", 0.8 - 0.6 * digit),
        "elsewhere": save(tmp_path / "c.png", wide),
        "red on green of equal brightness": save(tmp_path / "d.png", colored((1, 0, 0), (0, 0.51, 0))),
        "yellow on white": save(tmp_path / "e.png", colored((1, 1, 0), (1, 1, 1))),
        "black on transparent": save(tmp_path / "f.png", np.dstack([np.zeros((60, 40, 3)), digit])),
        "white on transparent": save(tmp_path / "g.png", np.dstack([np.ones((60, 40, 3)), digit])),
        "gray with alpha": save(tmp_path / "h.png", np.dstack([1 - digit, np.ones((60, 40))])),
    }
    for name, path in pictures.items():
        assert torch.allclose(load_picture(path), expected, atol=0.02), name
    big = np.kron(1 - digit, np.ones((9, 9)))
    assert (load_picture(save(tmp_path / "big.png", big)) - expected).abs().mean() < 0.01


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "LA"])
def test_every_mode_is_read(tmp_path, expected, mode):
    gray = Image.fromarray((seven() * 255).astype(np.uint8))
    if mode == "I;16":
        picture = Image.fromarray((seven() * 40_000 + 10_000).astype(np.uint16))
    elif mode == "LAB":
        picture = Image.merge("LAB", (gray, *[Image.new("L", gray.size, 128)] * 2))
    elif mode == "HSV":
        picture = Image.merge("RGB", (gray, gray, gray)).convert("HSV").convert("RGB")
    else:
        picture = gray.convert(mode)
    path = tmp_path / "picture.tif"
    picture.save(path)
    assert torch.allclose(load_picture(path), expected, atol=0.03)


def test_a_jpeg_of_a_photo_turned_by_its_exif_tag_is_read_upright(tmp_path, expected):
    picture = Image.fromarray((255 - seven() * 255).astype(np.uint8)).resize((400, 600))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise for viewing
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", exif=exif, quality=90)
    assert (load_picture(tmp_path / "photo.jpg") - expected).abs().mean() < 0.02


def test_a_framed_picture_passes_through_untouched(tmp_path):
    values = np.zeros((28, 28), np.uint8)
    values[3:9, 5:25] = np.arange(120).reshape(6, 20) * 2
    Image.fromarray(values).save(tmp_path / "white.png")
    Image.fromarray(255 - values).save(tmp_path / "black.png")
    Image.fromarray(values).convert("RGB").save(tmp_path / "rgb.png")
    framed = torch.from_numpy(values).float()[None] / 255
    assert torch.equal(load_picture(tmp_path / "white.png"), framed)
    assert torch.equal(load_picture(tmp_path / "rgb.png"), framed)
    assert torch.allclose(load_picture(tmp_path / "black.png"), framed, atol=1e-6)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_read_as_eight_are(tmp_path, ending):
    path, dim = tmp_path / f"picture.{ending}", 0.157 * seven()[10:38, 6:34]
    Image.fromarray((dim * 65_535).astype(np.uint16)).save(path)
    assert torch.allclose(load_picture(path)[0], torch.tensor(dim, dtype=torch.float32), atol=1e-4)
    paper = np.full((60, 40), 40_000, np.uint16)
    paper[30, 20] += 1
    Image.fromarray(paper).save(path)
    with pytest.raises(InputError, match="too little contrast"):
        load_picture(path)


def test_mnist_images_come_back_from_png_bit_for_bit(tmp_path, mnist_test):
    for image in mnist_test[0][:20]:
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(tmp_path / "digit.png")
        assert torch.equal(load_picture(tmp_path / "digit.png"), image)


def test_other_image_sizes(tmp_path):
    path = save(tmp_path / "plain.png", seven())
    image = load_picture(path, image_size=32)
    assert image.shape == (1, 32, 32)
    rows = image[0].amax(dim=1).nonzero()
    assert rows[-1] - rows[0] + 1 == round(32 * 20 / 28)


def test_thin_lines_stay_visible_and_off_balance_ink_stays_inside(tmp_path):
    picture = np.ones((1000, 1000))
    picture[100:900, 500:502] = 0
    assert load_picture(save(tmp_path / "one.png", picture)).max() == 1
    ink = torch.zeros(28, 28)
    ink[0, 0] = ink[27, 27] = 0.5
    ink[0, 1] = 1
    assert torch.equal(center(ink), ink)
    assert torch.equal(center(torch.zeros(3, 3), 5), torch.zeros(5, 5))


def broken(tmp_path, kind):
    path = tmp_path / "picture.png"
    if kind == "no picture":
        path.write_text("seven")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        save(path, np.random.default_rng(0).random((60, 40)))
        path.write_bytes(path.read_bytes()[:500])
    elif kind == "blank":
        save(path, np.full((60, 40), 0.7))
    elif kind == "blank, framed":
        save(path, np.full((28, 28), 0.7))
    elif kind == "pale":
        save(path, (150 - 10 * seven()) / 255)
    elif kind == "pale, framed":
        save(path, (150 - 10 * seven()[10:38, 6:34]) / 255)
    elif kind == "transparent":
        save(path, np.zeros((60, 40, 4)))
    elif kind == "nan":
        path = tmp_path / "picture.tif"
        Image.fromarray(np.full((40, 40), np.nan, np.float32)).save(path)
    elif kind == "huge":
        Image.new("1", (20_000, 10_000)).save(path)
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no picture at"),
        ("no picture", "not a picture"),
        ("empty", "not a picture"),
        ("truncated", "cannot read"),
        ("blank", "blank"),
        ("blank, framed", "blank"),
        ("pale", r"too little contrast.*differ by 3\.9% of .*at least 6%"),
        ("pale, framed", r"too little contrast.*differ by 3\.9% of"),
        ("transparent", "blank"),
        ("nan", "NaN"),
        ("huge", "too many pixels"),
        ("folder", "is a folder, not a picture"),
    ],
)
def test_what_is_no_usable_picture_is_one_clear_line(tmp_path, kind, message):
    with pytest.raises(InputError, match=message) as caught:
        load_picture(broken(tmp_path, kind))
    assert "\n" not in str(caught.value)
