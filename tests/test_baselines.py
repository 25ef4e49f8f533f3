"""The baseline networks: shapes, purity, gradients, and nearest neighbor against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from absynth.baselines import CNN, Binarized, MadryCNN, NearestNeighbor
from absynth.errors import InputError


def random_images(count: int, size: int = 28, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand((count, channels, size, size), generator=torch.Generator().manual_seed(seed))


def gray_images(count: int, size: int = 28, channels: int = 1, seed: int = 0) -> Tensor:
    """Images whose values are multiples of 1/255, like every stored picture."""
    return (random_images(count, size, channels, seed) * 255).round().to(torch.uint8).float() / 255


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with batch-norm statistics and weights that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point():
                scale = value.std() if value.numel() > 1 and value.std() > 0 else torch.tensor(0.1)
                value.add_(torch.randn(value.shape, generator=generator) * scale)
    return model.eval()


def nearest_neighbor(count: int = 300) -> NearestNeighbor:
    return NearestNeighbor(gray_images(count, seed=5), torch.arange(count) % 10).eval()


MODELS = {
    "cnn": lambda: settled(CNN()),
    "transfer-cnn": lambda: settled(CNN((32, 32, 64))),
    "binary-cnn": lambda: settled(Binarized(CNN())),
    "madry": lambda: settled(MadryCNN()),
    "nearest-neighbor": nearest_neighbor,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


def test_layer_sizes_are_the_papers() -> None:
    shapes = [tuple(p.shape) for n, p in CNN().named_parameters() if n.startswith("conv") and n.endswith("weight")]
    assert shapes == [(20, 1, 5, 5), (70, 20, 4, 4), (256, 70, 3, 3), (10, 256, 5, 5)]
    assert MadryCNN().dense_0.weight.shape == (1024, 3136)
    assert sum(p.numel() for p in MadryCNN().parameters()) == 3_274_634


@pytest.mark.parametrize(("classes", "channels", "size"), [(3, 3, 32), (10, 1, 28), (7, 2, 20)])
def test_other_classes_channels_and_sizes(classes: int, channels: int, size: int) -> None:
    images = random_images(4, size, channels)
    labels = torch.arange(2 * classes) % classes
    for model in (
        CNN((4, 5, 6), classes, channels, size),
        MadryCNN(classes, channels, size),
        Binarized(MadryCNN(classes, channels, size)),
        NearestNeighbor(gray_images(2 * classes, size, channels), labels),
    ):
        logits = model.eval()(images)
        assert logits.shape == (4, classes)
        assert logits.dtype == torch.float32


def test_logits_do_not_depend_on_batch_order_or_history(model: nn.Module) -> None:
    images = random_images(130, seed=2)
    with torch.no_grad():
        together = model(images)
        assert together.std() > 1e-3  # a constant would pass everything below
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(model(images[order]), together[order], atol=1e-4, rtol=1e-5)
        alone = torch.cat([model(images[i : i + 1]) for i in range(0, 130, 10)])
        torch.testing.assert_close(alone, together[::10], atol=1e-4, rtol=1e-5)
        torch.manual_seed(99)
        assert torch.equal(model(images), together)


@pytest.mark.parametrize("name", ["cnn", "transfer-cnn", "madry", "nearest-neighbor"])
def test_gradient_is_the_derivative(name: str) -> None:
    """Along a segment, the mean directional derivative is the difference of the ends: also true across ReLU's kinks."""
    model = MODELS[name]()
    weights = torch.randn(10, generator=torch.Generator().manual_seed(5))
    start, end = random_images(3, seed=4), random_images(3, seed=6)
    for first, last in zip(start, end, strict=True):
        shares = ((torch.arange(200) + 0.5) / 200)[:, None, None, None]
        segment = (first + 0.2 * shares * (last - first)).requires_grad_(True)  # (200,1,28,28)
        (gradients,) = torch.autograd.grad((model(segment) @ weights).sum(), segment)
        mean_derivative = float((gradients * 0.2 * (last - first)).double().flatten(1).sum(1).mean())
        ends = torch.stack([first, first + 0.2 * (last - first)])
        with torch.no_grad():
            at_first, at_last = (model(ends) @ weights).double().tolist()
        assert mean_derivative == pytest.approx(at_last - at_first, rel=0.01, abs=2e-3)


def test_binarized_sees_only_which_side_of_the_threshold() -> None:
    classifier = settled(CNN())
    model = Binarized(classifier).eval()
    images = random_images(5)
    images[0, 0, 0, :3] = torch.tensor([0.5, 0.5 - 2**-25, 0.5 + 2**-24])  # at, just below and just above the threshold
    binary = torch.where(images >= 0.5, 1.0, 0.0)
    assert binary[0, 0, 0, :3].tolist() == [1, 0, 1]
    assert torch.equal(model(images), classifier(binary))
    # moving pixels without crossing the threshold changes nothing at all
    assert torch.equal(model((binary * 0.5 + images * 0.25).clamp(0, 1)), model(binary))


def test_binarized_classifies_equal_images_once() -> None:
    classifier, sizes = settled(CNN()), []
    classifier.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    model = Binarized(classifier).eval()
    different = random_images(3)
    images = different[[2, 0, 2, 1, 0, 2]]
    images[4] = torch.where(images[4] >= 0.5, 1.0, 0.0)  # another image, the same behind the threshold
    logits = model(images)
    assert sizes == [3]
    assert torch.allclose(logits, torch.cat([classifier((image[None] >= 0.5).float()) for image in images]), atol=1e-4)
    # with gradients, and in training, where the answers depend on the batch, every image is seen
    sizes.clear()
    model(images.requires_grad_())
    model.train()
    model(images.detach())
    assert sizes == [6, 6]


def test_binarized_gradient_passes_straight_through() -> None:
    classifier = settled(CNN())
    images = random_images(2).requires_grad_(True)
    binary = (images.detach() >= 0.5).float().requires_grad_(True)
    (through,) = torch.autograd.grad(Binarized(classifier).eval()(images)[:, 3].sum(), images)
    (inside,) = torch.autograd.grad(classifier(binary)[:, 3].sum(), binary)
    assert torch.equal(through, inside)
    assert through.abs().max() > 0


def test_nearest_neighbor_goes_by_the_images_that_are_loaded() -> None:
    labels = torch.arange(40) % 4
    first = NearestNeighbor(gray_images(40, size=6), labels)
    second = NearestNeighbor(gray_images(40, size=6).flip(0, 2), labels.roll(1).sort().values)
    queries = random_images(20, size=6, seed=8)
    assert not torch.equal(first(queries), second(queries))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(queries), second(queries))


def test_nearest_neighbor_against_brute_force() -> None:
    train, labels = gray_images(400, size=6), torch.arange(400) % 7
    train, labels = train[torch.randperm(400, generator=torch.Generator().manual_seed(1))], labels.flip(0)
    queries = torch.cat([random_images(150, size=6, seed=8), train[:10]])  # more than two chunks, some at distance 0
    model = NearestNeighbor(train, labels)
    distances = torch.cdist(
        queries.flatten(1).double(), train.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    classes = torch.arange(7)[:, None]
    distances = distances[:, None].masked_fill(labels != classes, torch.inf)  # (B,7,N)
    expected = -distances.amin(2).float()
    assert torch.equal(model(queries), expected)
    nearest = model.nearest(queries)
    assert torch.equal(model.images[nearest].float() / 255, train[distances.argmin(2)])
    assert torch.equal(model.labels[nearest], torch.arange(7).expand(len(queries), 7))
    assert (model(train[:10]).amax(1) == 0).all()


def test_nearest_neighbor_tells_near_twins_apart() -> None:
    """Two stored images that differ by one gray level of one pixel: far below the rounding of the matrix product."""
    bright = torch.full((2, 1, 28, 28), 1.0)
    bright[1, 0, 0, 0] = 254 / 255
    model = NearestNeighbor(torch.cat([bright, torch.zeros(1, 1, 28, 28)]), torch.tensor([0, 0, 1]))
    assert model(bright)[:, 0].tolist() == [0, 0]
    query = bright[1:].clone()
    query[0, 0, 0, 1] = 0.999
    assert float(model(query)[0, 0]) == pytest.approx(-0.001, rel=1e-3)


def test_nearest_neighbor_gradient_at_a_stored_image_is_finite() -> None:
    model = nearest_neighbor()
    image = (model.images[:1].float() / 255).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(image).sum(), image)
    assert gradient.isfinite().all()


def test_nearest_neighbor_refuses_bad_training_sets() -> None:
    images = gray_images(4, size=6)
    with pytest.raises(InputError, match="class 1 has no training image"):
        NearestNeighbor(images, torch.tensor([0, 0, 2, 2]))
    with pytest.raises(InputError, match="expected 4 integers"):
        NearestNeighbor(images, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="0 or more"):
        NearestNeighbor(images, torch.tensor([0, -1, 1, 1]))


def test_bad_images_are_refused(model: nn.Module) -> None:
    images = random_images(2)
    for bad in (images[0], images[:0], images * 255, images.double(), images.masked_fill(images > 0.99, torch.nan)):
        with pytest.raises(InputError):
            model(bad)
    if not isinstance(model, Binarized):
        with pytest.raises(InputError):
            model(images[..., :20, :20])


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="at least 14 pixels"):
        CNN(image_size=13)
    with pytest.raises(InputError, match="at least 4 pixels"):
        MadryCNN(image_size=3)
    with pytest.raises(InputError, match="between 0 and 1"):
        Binarized(CNN(), threshold=128)
