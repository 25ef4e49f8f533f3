import pytest
import torch

from absynth.checks import check_images, usable_device
from absynth.errors import InputError


def test_good_batches_pass():
    check_images(torch.rand(2, 1, 28, 28))
    check_images(torch.zeros(1, 1, 28, 28))
    check_images(torch.ones(1, 1, 28, 28))
    check_images(torch.rand(2, 3, 32, 32), channels=3, size=32)
    check_images(torch.rand(2, 1, 5, 9), size=None)
    check_images(torch.rand(1, 1, 28, 28, requires_grad=True))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(28, 28), r"shape \(28, 28\).*images\[None\]"),
        (torch.rand(1, 1, 1, 28, 28), "flatten the batch axes"),
        (torch.rand(0, 1, 28, 28), "empty batch"),
        (torch.rand(2, 3, 28, 28), "3 channels.*convert"),
        (torch.rand(2, 28, 28, 1), "permute"),
        (torch.rand(2, 1, 32, 32), r"\(2, 1, 32, 32\).*resize"),
        (torch.rand(2, 1, 28, 27), "resize"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), "torch.uint8.*255"),
        (torch.rand(2, 1, 28, 28, dtype=torch.float64), r"torch.float64.*images.float\(\)"),
        (torch.full((2, 1, 28, 28), 255.0), "0 to 255|255 to 255.*divide by 255"),
        (torch.full((2, 1, 28, 28), -0.5), r"\(images \+ 1\) / 2"),
        (torch.full((2, 1, 28, 28), 1.001), "1.001.*clamp"),
        (torch.full((2, 1, 28, 28), 1.0000001), "clamp"),
        (torch.full((2, 1, 28, 28), float("inf")), "inf"),
        (torch.tensor([0.5, float("nan")]).repeat(392).reshape(1, 1, 28, 28), "NaN"),
        ([[0.0]], "list"),
    ],
)
def test_bad_batches_are_named_on_one_line_with_the_fix(images, message):
    with pytest.raises(InputError, match=message) as caught:
        check_images(images)
    assert "\n" not in str(caught.value)


def test_one_bad_value_in_a_large_batch_is_found():
    for bad in (float("nan"), -1e-6, 1.00001):
        images = torch.rand(50, 1, 28, 28)
        images[37, 0, 20, 3] = bad
        with pytest.raises(InputError):
            check_images(images)


@pytest.mark.parametrize("name", ["gpu0", "cuda:99"])
def test_a_device_that_is_not_there_is_named_on_one_line(name):
    with pytest.raises(InputError, match=f"{name}.*use cpu") as caught:
        usable_device(name)
    assert "\n" not in str(caught.value)
    assert usable_device("cpu") == torch.device("cpu")
