"""The folded decoder against the decoder it stands for."""

import pytest
import torch

from absynth.decoding import FoldedDecoder, from_blocks, to_blocks
from absynth.vae import Decoder, VAEConfig


def random_decoder(image_size: int = 28, channels: int = 1, latent_size: int = 8, seed: int = 0) -> Decoder:
    """A decoder with weights and batch-norm statistics that no default could stand in for."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(VAEConfig(image_size, channels, latent_size)).eval()
    for name, tensor in decoder.state_dict().items():
        if name.endswith("running_var") or (name.startswith("bn") and name.endswith("weight")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            fan_in = tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 2.0
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in * 2)
    return decoder


@pytest.mark.parametrize(("image_size", "channels", "latent_size"), [(28, 1, 8), (32, 3, 5), (16, 1, 2)])
def test_folding_changes_nothing(image_size: int, channels: int, latent_size: int) -> None:
    decoder = random_decoder(image_size, channels, latent_size)
    latents = torch.randn(5, latent_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = decoder(latents)
        blocks = FoldedDecoder(decoder)(latents)
    assert expected.std() > 0.05  # a decoder that says something
    torch.testing.assert_close(from_blocks(blocks, channels), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(blocks, to_blocks(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("image_size", "channels"), [(28, 1), (20, 2)])
def test_tangents_are_the_jacobian(image_size: int, channels: int) -> None:
    decoder = random_decoder(image_size, channels)
    folded = FoldedDecoder(decoder)
    latents = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        tangents = folded.tangents(folded.activations(latents))
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda z: to_blocks(decoder(z[None]))[0], latents[row])  # (N,D)
        assert jacobian.abs().max() > 1e-2
        torch.testing.assert_close(tangents[row], jacobian.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("image_size", "channels", "latent_size"), [(28, 1, 8), (20, 2, 3)])
def test_pullback_is_the_gradient(image_size: int, channels: int, latent_size: int) -> None:
    decoder = random_decoder(image_size, channels, latent_size)
    folded = FoldedDecoder(decoder)
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(3, latent_size, generator=generator, requires_grad=True)
    cotangents = torch.randn(3, channels, image_size, image_size, generator=generator)
    (expected,) = torch.autograd.grad((decoder(latents) * cotangents).sum(), latents)
    with torch.no_grad():
        found = folded.pullback(folded.activations(latents.detach()), to_blocks(cotangents))
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_blocks_are_a_permutation() -> None:
    images = torch.arange(2 * 3 * 16 * 16, dtype=torch.float32).view(2, 3, 16, 16)
    blocks = to_blocks(images)
    assert torch.equal(blocks.sort(dim=1).values, images.flatten(1))
    assert torch.equal(from_blocks(blocks, 3), images)
    # the first block of 4 x 4 pixels, read along the last axis of the unshuffled image
    assert torch.equal(from_blocks(blocks[None], 3), images[None])
