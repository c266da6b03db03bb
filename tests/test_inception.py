"""The FID's Inception under seeded weights: public names, features of the public port, refusals."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from exactflow.core.grey_levels import center
from exactflow.metrics.extractors import extract, inception
from exactflow.metrics.inception import PUBLIC_FILE, PUBLIC_SHA256, Inception, read_inception

# Of the names and shapes, in order, in the network of the public port (pytorch-fid 0.3.0).
LAYOUT = "8ca497103391675d239b6cbe936a080934f935dfd57b70343674200035f2c5e8"
# What that port gives for `seeded_state` and `some_images`: features 0, 100, 200 .. 2000.
GOLDEN = [
    [
        0.00157,
        7.64483,
        0.91758,
        5.38070,
        0.05080,
        0.00000,
        12.98972,
        0.90287,
        0.31093,
        2.12372,
        0.50500,
        0.73065,
        0.74717,
        0.35412,
        2.11048,
        1.02903,
        0.00801,
        7.69550,
        3.49756,
        0.00000,
        0.83329,
    ],
    [
        0.00000,
        7.74932,
        0.92239,
        5.65921,
        0.06502,
        0.00000,
        13.69899,
        0.91037,
        0.37569,
        2.29849,
        0.38561,
        0.62193,
        0.81377,
        0.34388,
        2.17847,
        1.20749,
        0.01125,
        8.01886,
        3.82751,
        0.00000,
        0.96324,
    ],
]


def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = Inception()
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def seeded_state() -> dict[str, Tensor]:
    """Random weights that keep activations near 1, and random statistics."""
    source = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(shape, generator=source) + 0.5
        elif len(shape) > 1:
            scale = (2 / int(np.prod(shape[1:]))) ** 0.5
            state[name] = torch.randn(shape, generator=source) * scale
        else:
            state[name] = torch.randn(shape, generator=source) * 0.1
    return state


def some_images(n: int = 2, channels: int = 3) -> Tensor:
    values = np.random.default_rng(0).integers(0, 256, (n, channels, 40, 56), dtype=np.uint8)
    return torch.from_numpy(values)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(seeded_state(), path)
    return path


def test_names_and_shapes_are_those_of_the_public_file() -> None:
    found = shapes()
    text = "\n".join(f"{name} {list(shape)}" for name, shape in found.items())
    assert hashlib.sha256(text.encode()).hexdigest() == LAYOUT
    assert len(found) == 566
    assert sum(name.endswith("conv.weight") for name in found) == 94
    assert found["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert found["Mixed_5b.branch1x1.bn.running_mean"] == (64,)
    assert found["Mixed_6c.branch7x7dbl_2.conv.weight"] == (160, 160, 7, 1)
    assert found["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert found["fc.weight"] == (1008, 2048)
    with torch.device("meta"):
        assert sum(p.numel() for p in Inception().parameters()) == 23_850_960
    assert PUBLIC_SHA256.startswith(PUBLIC_FILE.removesuffix(".pth").rsplit("-", 1)[1])


@pytest.mark.slow
def test_features_are_those_of_the_public_port(weights: Path) -> None:
    found = extract(inception(weights), some_images(), 256)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found[:, ::100], torch.tensor(GOLDEN), rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_what_is_read(weights: Path) -> None:
    network, digest = read_inception(weights)
    assert digest == hashlib.sha256(weights.read_bytes()).hexdigest()
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in seeded_state().items())
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.slow
def test_each_image_counts_alone_and_grey_is_rgb_of_one_value(weights: Path) -> None:
    extractor = inception(weights)
    images = some_images(3, channels=1)
    together = extract(extractor, images, 256, batch_size=3)
    apart = extract(extractor, images.numpy(), 256, batch_size=2)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)
    colour = extract(extractor, images[:1].expand(-1, 3, -1, -1), 256)
    torch.testing.assert_close(colour, together[:1], rtol=1e-4, atol=1e-4)


def test_images_are_interpolated_between_pixel_centres_without_a_filter(weights: Path) -> None:
    images = some_images(1)
    network, _ = read_inception(weights)
    x = center(images, 256)
    exact = []  # along each axis: the two nearest pixel centres, clamped at the border
    for size in x.shape[2:]:
        place = ((torch.arange(299) + 0.5) * (size / 299) - 0.5).clamp(0, size - 1)
        below = place.floor().long()
        above = (below + 1).clamp(max=size - 1)
        share = place - below
        exact.append(F.one_hot(below, size) * (1 - share[:, None]))
        exact[-1] = exact[-1] + F.one_hot(above, size) * share[:, None]
    resized = exact[0] @ x @ exact[1].T
    found = extract(inception(weights), images, 256)
    torch.testing.assert_close(found, network(resized), rtol=1e-3, atol=1e-3)


def test_only_the_public_weights_make_an_fid(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    extractor = inception(weights)
    assert extractor.name == f"inception-{digest[:8]}"
    assert extractor.dims == 2048
    assert extractor.distance_name == f"FD-inception-{digest[:8]}"
    monkeypatch.setattr("exactflow.metrics.extractors.PUBLIC_SHA256", digest)
    assert inception(weights).distance_name == "FID"


def test_a_hash_is_checked_whether_given_or_in_the_name(weights: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert read_inception(weights, digest.upper())[1] == digest
    with pytest.raises(ValueError, match="SHA-256 begins with 00ff, got"):
        read_inception(weights, "00ff")
    named = tmp_path / PUBLIC_FILE
    named.symlink_to(weights)
    with pytest.raises(ValueError, match="SHA-256 begins with 6726825d, got"):
        inception(named)


def test_an_address_is_read_once(tmp_path: Path, weights: Path) -> None:
    source, cache = tmp_path / "remote.pth", tmp_path / "cache"
    source.hardlink_to(weights)
    first = read_inception(source.as_uri(), cache_dir=cache)[1]
    source.unlink()
    assert read_inception(source.as_uri(), first, cache_dir=cache)[1] == first
    with pytest.raises(FileNotFoundError, match=r"expected Inception weights at file:"):
        read_inception((tmp_path / "absent.pth").as_uri(), cache_dir=cache)
    (tmp_path / "half.pth").write_bytes(weights.read_bytes()[:10_000])
    with pytest.raises(ValueError, match=r"got .* \(10,000 bytes\)"):
        read_inception((tmp_path / "half.pth").as_uri(), first, cache_dir=cache)
    assert len(list(cache.iterdir())) == 1  # what has another hash is not kept


def test_other_files_are_refused(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        inception(tmp_path / "absent.pth")
    path = tmp_path / "file.pth"
    path.write_bytes(weights.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match="not a whole PyTorch file of plain tensors"):
        inception(path)
    torch.save({"conv.weight": torch.zeros(2), "code": print}, path)
    with pytest.raises(ValueError, match="not a whole PyTorch file of plain tensors"):
        inception(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="flat state dict of tensors"):
        inception(path)
    state = {name: value for name, value in seeded_state().items() if name != "fc.bias"}
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"fc.bias is expected as \(1008,\), got absent"):
        inception(path)
    torch.save({**state, "fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(ValueError, match=r"fc.bias is expected as \(1008,\), got \(1000,\)"):
        inception(path)
    torch.save({**state, "fc.bias": torch.zeros(1008), "AuxLogits.fc.bias": torch.zeros(8)}, path)
    with pytest.raises(ValueError, match=r"AuxLogits.fc.bias is expected as absent, got \(8,\)"):
        inception(path)


def test_images_of_other_kinds_are_refused(weights: Path) -> None:
    extractor = inception(weights)
    with pytest.raises(ValueError, match="grey or RGB images, got 2 channels"):
        extract(extractor, some_images(1, channels=2), 256)
    with pytest.raises(ValueError, match=r"expected grey levels 0 .. 16"):
        extract(extractor, some_images(1), 17)
    with pytest.raises(ValueError, match="expected images and batch_size >= 1, got 0"):
        extract(extractor, some_images()[:0], 256)
