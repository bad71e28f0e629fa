"""Distortion of training images against per-pixel float64 arithmetic, within its limits, and decided by key alone."""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cache
from typing import get_args

import numpy as np
import pytest
import torch

from cluster import keys
from cluster.config.loading import resolve
from cluster.config.run import RunConfig
from cluster.config.sections import Augment, GlyphsData, MetadataSplit, StoreData
from cluster.episodes import open_source
from cluster.episodes.augment import NUMBERS, OFF, distort, draw, inverse_maps
from cluster.episodes.sampler import StoreSource
from cluster.errors import ConfigError, SplitError
from cluster.messages import SplitName

SPLIT = MetadataSplit(column="alphabet", val=("v",), test=("t",))
CLASSES, EACH = 30, 8
STRONG = Augment(rotate=25, scale=0.3, shift=0.15, shear=15)


@dataclass
class Store:
    """A store in memory, eight samples a class."""

    samples: np.ndarray
    digest: str = "d" * 64
    classes: tuple[str, ...] = tuple(f"class {i}" for i in range(CLASSES))
    class_start: np.ndarray = field(default_factory=lambda: EACH * np.arange(CLASSES))
    class_count: np.ndarray = field(default_factory=lambda: np.full(CLASSES, EACH))

    def __post_init__(self) -> None:
        self.sample_shape = self.samples.shape[1:]
        self.class_metadata = {"alphabet": tuple("a" * 16 + "v" * 7 + "t" * 7)}


def noise(count: int, *shape: int) -> np.ndarray:
    """Bytes, ``[count, *shape]``."""
    drawn = keys.words(0, "noise", "", np.arange(count, dtype=np.int64), math.prod(shape))
    return (drawn >> np.uint32(24)).astype(np.uint8).reshape(count, *shape)


def pictures(count: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(noise(count, *shape)).float() / 255


@cache
def source(augment: Augment = STRONG, rotations: bool = False) -> StoreSource:
    return StoreSource(Store(noise(CLASSES * EACH, 2, 7, 7)), SPLIT, 11, rotations, augment)


def distorted(images: torch.Tensor, limits: Augment, numbers: list[float] | np.ndarray) -> torch.Tensor:
    """All ``images`` distorted by the same five numbers, or each by its own."""
    each = np.broadcast_to(np.asarray(numbers, dtype=np.float64), (len(images), NUMBERS))
    return distort(images, torch.from_numpy(inverse_maps(limits, each, *images.shape[2:])))


def numbers_of(images: int) -> np.ndarray:
    return draw(5, "train", np.arange(images, dtype=np.int64), 1, 1).reshape(images, NUMBERS)


def pixel_by_pixel(image: np.ndarray, limits: Augment, numbers: np.ndarray) -> np.ndarray:
    """One image ``[channel, height, width]`` distorted in float64, from the forward map in pixels, y upwards."""
    turn, size, right, down, shear = numbers.tolist()
    angle, slant = math.radians(limits.rotate) * turn, -math.tan(math.radians(limits.shear) * shear)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    forward = (1 + limits.scale * size) * rotation @ np.array([[1, slant], [0, 1]])
    _, height, width = image.shape
    moved = np.array([limits.shift * right * width, -limits.shift * down * height])
    result = np.zeros(image.shape)
    for row in range(height):
        for column in range(width):
            at = np.array([column + 0.5 - width / 2, height / 2 - row - 0.5])
            x, y = np.linalg.solve(forward, at - moved)
            left, top = x + width / 2 - 0.5, height / 2 - y - 0.5
            for i in (math.floor(top), math.floor(top) + 1):
                for j in (math.floor(left), math.floor(left) + 1):
                    if 0 <= i < height and 0 <= j < width:
                        result[:, row, column] += (1 - abs(top - i)) * (1 - abs(left - j)) * image[:, i, j]
    return result


@pytest.mark.parametrize("limits", [STRONG, Augment(rotate=180), Augment(scale=0.9), Augment(shear=60)])
def test_distortion_equals_pixel_by_pixel_arithmetic(limits: Augment) -> None:
    images, numbers = pictures(12, 2, 6, 9), numbers_of(12)
    expected = [pixel_by_pixel(*pair) for pair in zip(images.double().numpy(), [limits] * 12, numbers, strict=True)]
    assert np.abs(distorted(images, limits, numbers).numpy() - np.stack(expected)).max() < 1e-5


def test_no_number_is_no_distortion() -> None:
    images = pictures(4, 3, 28, 20)
    assert (distorted(images, STRONG, [0.0] * NUMBERS) - images).abs().max() < 1e-5


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("turns", [-1, 1])
def test_a_quarter_turn_is_a_quarter_turn(side: int, turns: int) -> None:
    images = pictures(4, 3, side, side)
    turned = distorted(images, Augment(rotate=90), [turns, 0, 0, 0, 0])
    assert (turned - torch.rot90(images, turns, (2, 3))).abs().max() < 1e-5


def test_a_shift_by_whole_pixels_moves_them_and_fills_with_zeros() -> None:
    images = pictures(4, 1, 10, 20)
    moved = distorted(images, Augment(shift=0.1), [0, 0, 1, -1, 0])
    assert (moved[:, :, :9, 2:] - images[:, :, 1:, :18]).abs().max() < 1e-5
    assert moved[:, :, 9].abs().max() < 1e-5 and moved[:, :, :, :2].abs().max() < 1e-5


def test_values_stay_in_the_unit_interval() -> None:
    limits = Augment(rotate=180, scale=0.5, shift=0.1, shear=30)
    result = distorted(torch.ones(20_000, 1, 5, 5), limits, numbers_of(20_000))
    assert result.max() == 1 and result.min() == 0


def test_nothing_changes_where_it_is_off() -> None:
    plain, off = (
        StoreSource(Store(noise(CLASSES * EACH, 2, 7, 7)), SPLIT, 11, False, *given).sample("train", 0, 8, 5, 1, 5)
        for given in ((), (Augment(),))
    )
    assert torch.equal(plain.support_x, off.support_x) and torch.equal(plain.query_x, off.query_x)


@pytest.mark.parametrize("rotations", [False, True])
def test_the_sampler_distorts_each_sample_by_its_own_numbers(rotations: bool) -> None:
    plain, given = (source(augment, rotations).sample("train", 3, 4, 5, 2, 3) for augment in (OFF, STRONG))
    numbers = draw(11, "train", np.arange(3, 7, dtype=np.int64), 5, 5)
    for name, part in (("support_x", numbers[:, :, :2]), ("query_x", numbers[:, :, 2:])):
        expected = distorted(getattr(plain, name).flatten(0, 1), STRONG, part.reshape(-1, NUMBERS))
        assert torch.equal(getattr(given, name).flatten(0, 1), expected)
        assert getattr(given, name).is_contiguous()
    for name in plain.metadata:
        assert np.array_equal(plain.metadata[name], given.metadata[name])


@pytest.mark.parametrize("split", [name for name in get_args(SplitName) if name != "train"])
def test_only_training_is_distorted(split: SplitName) -> None:
    plain, given = (source(augment).sample(split, 0, 8, 5, 1, 5) for augment in (OFF, STRONG))
    assert torch.equal(plain.support_x, given.support_x) and torch.equal(plain.query_x, given.query_x)


@pytest.mark.parametrize("together", [1, 8, 32])
def test_an_episode_has_the_same_bits_in_any_batch(together: int) -> None:
    images = StoreSource(Store(noise(CLASSES * EACH, 1, 28, 28)), SPLIT, 11, False, STRONG)
    whole = images.sample("train", 0, 96, 5, 1, 5)
    parts = [images.sample("train", first, together, 5, 1, 5) for first in range(0, 96, together)]
    for name in ("support_x", "query_x"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_growing_query_or_way_keeps_what_was_there() -> None:
    few, many = source().sample("train", 0, 16, 3, 2, 1), source().sample("train", 0, 16, 5, 2, 4)
    assert torch.equal(few.support_x, many.support_x[:, :6])
    assert torch.equal(few.query_x.unflatten(1, (3, 1)), many.query_x.unflatten(1, (5, 4))[:, :3, :1])


def test_numbers_are_pinned_uniform_and_apart() -> None:
    numbers = draw(11, "train", np.arange(400, dtype=np.int64), 5, 6)
    assert hashlib.sha256(numbers.tobytes()).hexdigest()[:16] == "67a86c08b96b4024"
    assert numbers.min() >= -1 and numbers.max() < 1
    for i in range(NUMBERS):
        counts, _ = np.histogram(numbers[..., i], bins=16, range=(-1, 1))
        assert ((counts - 750) ** 2 / 750).sum() < 37.7, "chi-square, 15 degrees, p = 0.001"
    correlations = np.corrcoef(numbers.reshape(-1, NUMBERS), rowvar=False) - np.eye(NUMBERS)
    assert np.abs(correlations).max() < 0.03, "3.3 standard deviations of 12,000 pairs"
    assert len(np.unique(numbers)) == numbers.size


def blob(side: int = 40, long: float = 2.0) -> torch.Tensor:
    """A smooth spot in the middle, ``long`` times as wide as high, ``[1, 1, side, side]``."""
    at = torch.arange(side) + 0.5 - side / 2
    return torch.exp(-((at / (2.5 * long)) ** 2 + (at[:, None] / 2.5) ** 2) / 2)[None, None]


def moments(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Each image's centroid from the middle, ``[image, 2]``, and covariance, ``[image, 2, 2]``: pixels, y downwards."""
    side = images.shape[-1]
    at = (torch.arange(side) + 0.5 - side / 2).double()
    weights = images[:, 0].double() / images[:, 0].double().sum((1, 2), keepdim=True)
    places = torch.stack(torch.broadcast_tensors(at, at[:, None]), -1)
    middle = (weights[..., None] * places).sum((1, 2))
    apart = places - middle[:, None, None]
    return middle.numpy(), torch.einsum("nhw,nhwi,nhwj->nij", weights, apart, apart).numpy()


def test_shifts_stay_within_the_limit_and_reach_it() -> None:
    middle, _ = moments(distorted(blob().expand(500, -1, -1, -1), Augment(shift=0.1), numbers_of(500)))
    farthest = np.abs(middle).max(axis=0)
    assert farthest.min() > 3.9 and farthest.max() < 4.001


def test_other_distortions_leave_the_middle_where_it_is() -> None:
    limits = Augment(rotate=30, scale=0.2, shear=20)
    middle, _ = moments(distorted(blob().expand(500, -1, -1, -1), limits, numbers_of(500)))
    assert np.abs(middle).max() < 1e-3


def test_turns_stay_within_the_limit_and_reach_it() -> None:
    _, spread = moments(distorted(blob().expand(500, -1, -1, -1), Augment(rotate=30), numbers_of(500)))
    turns = np.degrees(np.arctan2(2 * spread[:, 0, 1], spread[:, 0, 0] - spread[:, 1, 1]) / 2)
    assert -30.1 < turns.min() < -29 and 29 < turns.max() < 30.1


def test_sizes_stay_within_the_limit_and_reach_it() -> None:
    _, spread = moments(distorted(blob(long=1.0).expand(500, -1, -1, -1), Augment(scale=0.3), numbers_of(500)))
    sizes = np.linalg.det(spread) ** 0.25 / 2.5
    assert 0.68 < sizes.min() < 0.72 and 1.28 < sizes.max() < 1.32, "resampling blurs by up to two hundredths"


def test_shears_stay_within_the_limit_and_reach_it() -> None:
    _, spread = moments(distorted(blob(long=1.0).expand(500, -1, -1, -1), Augment(shear=20), numbers_of(500)))
    shears = np.degrees(np.arctan(spread[:, 0, 1] / spread[:, 1, 1]))
    assert -20.1 < shears.min() < -19 and 19 < shears.max() < 20.1


def test_features_are_refused() -> None:
    features = Store(np.zeros((CLASSES * EACH, 3), dtype=np.float32))
    with pytest.raises(SplitError, match=r"augment distorts images, .* are \(3,\); leave data.augment out"):
        StoreSource(features, SPLIT, 0, False, Augment(shift=0.1))
    assert StoreSource(features, SPLIT, 0, False, Augment()).sample_shape == (3,)


def test_recipes_and_options_set_it() -> None:
    recipe = {"data": {"type": "store", "augment": {"shift": 0.1, "scale": 0.2}}}
    config = resolve(recipe, [("data.augment.rotate", "15"), ("data.augment.scale", "0.25")])
    assert config.data == StoreData(augment=Augment(rotate=15, scale=0.25, shift=0.1))
    assert resolve({}, [("data.augment.shear", "5")]).data == GlyphsData(augment=Augment(shear=5))
    assert config.result_digest() != resolve({"data": {"type": "store"}}).result_digest()
    with pytest.raises(ConfigError, match=r"data\.augment\.shift"):
        resolve({}, [("data.augment.shift", "0.6")])
    with pytest.raises(ConfigError, match=r"data\.augment belongs to data\.type glyphs or store"):
        resolve({"data": {"type": "sinusoid"}}, [("data.augment.shift", "0.1")])


def test_the_glyphs_are_distorted() -> None:
    plain, given = (
        open_source(RunConfig(data=GlyphsData(size=8, augment=augment))).sample("train", 0, 2, 5, 1, 1)
        for augment in (OFF, STRONG)
    )
    numbers = draw(0, "train", np.arange(2, dtype=np.int64), 5, 2)[:, :, :1].reshape(-1, NUMBERS)
    assert torch.equal(given.support_x.flatten(0, 1), distorted(plain.support_x.flatten(0, 1), STRONG, numbers))
