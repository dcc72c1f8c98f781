"""Transforms: close to Pillow's results, random by their generator only, and doing what their name says."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as reference

from mt_deepspeed.data.augment import rand_augment, random_augment
from mt_deepspeed.data.images import to_picture, to_tensor
from mt_deepspeed.data.keyed import Purpose, keyed_generator
from mt_deepspeed.data.transforms import CROP_RATIO, RECIPES, ImageTransform, crop_box

SIZE = 32


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth noise [3, height, width]."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 6 + 2, width // 6 + 2, 3))
    image = Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return to_tensor(image)


def generator(position: int = 0) -> np.random.Generator:
    return keyed_generator(5, position, Purpose.IMAGE)


@pytest.mark.parametrize("name", ["clip", "albef", "blip"])
@pytest.mark.parametrize("shape", [(40, 70), (71, 40), (33, 33), (20, 90), (32, 32), (17, 25)])
def test_evaluation_transforms_agree_with_pillow(name: str, shape: tuple[int, int]) -> None:
    bicubic = reference.InterpolationMode.BICUBIC
    steps = {
        "clip": [reference.Resize(SIZE, bicubic), reference.CenterCrop(SIZE)],
        "albef": [reference.Resize((SIZE, SIZE), bicubic)],
    }
    pixels = picture(*shape)
    expected = reference.Compose(steps["albef" if name == "blip" else name])(to_picture(pixels))
    found = ImageTransform(name, SIZE, train=False)(pixels, generator())
    assert found.shape == (3, SIZE, SIZE)
    assert int((found.int() - to_tensor(expected).int()).abs().max()) <= 2


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_transform_depends_on_its_generator_only(name: str) -> None:
    pixels = picture(50, 60)
    transform = ImageTransform(name, SIZE, train=True)
    results = [transform(pixels, generator(i)) for i in range(12)]
    assert all(result.shape == (3, SIZE, SIZE) and result.dtype == torch.uint8 for result in results)
    torch.manual_seed(1)
    np.random.seed(1)
    again = pickle.loads(pickle.dumps(transform))
    assert all(torch.equal(result, again(pixels, generator(i))) for i, result in enumerate(results))
    differ = any(not torch.equal(results[0], result) for result in results)
    assert differ == RECIPES[name].random


def test_random_transforms_are_refused_in_evaluation() -> None:
    with pytest.raises(ValueError, match=r"eval_transform 'albef_randaug'.*albef, blip, clip"):
        ImageTransform("albef_randaug", SIZE, train=False)
    with pytest.raises(ValueError, match=r"train_transform 'nonsense'"):
        ImageTransform("nonsense", SIZE, train=True)


def test_only_the_wohf_transforms_never_flip() -> None:
    ramp = torch.linspace(0, 255, 60).to(torch.uint8).expand(3, 50, 60)

    def flips(name: str) -> int:
        results = [ImageTransform(name, SIZE, train=True)(ramp, generator(i)).float() for i in range(60)]
        return sum(float(result[..., :8].mean()) > float(result[..., -8:].mean()) for result in results)

    assert flips("albef_randaug_wohf") == 0
    assert 15 < flips("albef_randaug") < 45


@settings(max_examples=200)
@given(
    height=st.integers(1, 400),
    width=st.integers(1, 400),
    area=st.sampled_from([(0.5, 1.0), (0.2, 1.0)]),
    position=st.integers(0, 10**9),
)
def test_crops_lie_inside_and_keep_their_bounds(
    height: int, width: int, area: tuple[float, float], position: int
) -> None:
    top, left, crop_height, crop_width = crop_box(height, width, area, generator(position))
    assert crop_height >= 1
    assert crop_width >= 1
    assert 0 <= top <= height - crop_height
    assert 0 <= left <= width - crop_width
    if min(height, width) > 100 and max(height, width) < 1.3 * min(height, width):
        assert area[0] - 0.02 <= crop_height * crop_width / (height * width) <= 1
        assert CROP_RATIO[0] - 0.02 <= crop_width / crop_height <= CROP_RATIO[1] + 0.02


def test_crops_spread_over_area_and_place() -> None:
    boxes = [crop_box(100, 120, (0.5, 1.0), generator(i)) for i in range(400)]
    shares = np.array([height * width / 12_000 for _, _, height, width in boxes])
    assert shares.min() < 0.55
    assert shares.max() > 0.9
    assert len({box[:2] for box in boxes}) > 100


def applied(augment: object, pixels: torch.Tensor, draws: int) -> list[np.ndarray]:
    image = to_picture(pixels)
    return [np.asarray(augment(image, generator(i))) for i in range(draws)]  # type: ignore[operator]


def test_rand_augment_always_acts_and_random_augment_often_rests() -> None:
    pixels = picture(40, 50)
    same = [
        np.mean([np.array_equal(result, np.asarray(to_picture(pixels))) for result in results])
        for results in (
            applied(rand_augment(9), pixels, 200),
            applied(random_augment(7, colours=False), pixels, 200),
        )
    ]
    assert same[0] < 0.1
    assert 0.2 < same[1] < 0.5  # both operations rest in a quarter of the cases


def test_level_five_enhances_nothing() -> None:
    """Factor 0.1 + 1.8 * 0.5 is 1: with one operation only shapes, equalize and autocontrast act."""
    pixels = picture(40, 50)
    weak = applied(random_augment(5, colours=False, count=1), pixels, 300)
    strong = applied(random_augment(7, colours=False, count=1), pixels, 300)
    rests = [
        np.mean([np.array_equal(r, np.asarray(to_picture(pixels))) for r in rs]) for rs in (weak, strong)
    ]
    assert rests[0] > rests[1] + 0.05


def test_warps_fill_with_grey_or_black() -> None:
    white = torch.full((3, 40, 50), 255, dtype=torch.uint8)
    grey = np.concatenate([r.reshape(-1, 3) for r in applied(random_augment(10, False, 1), white, 60)])
    black = np.concatenate([r.reshape(-1, 3) for r in applied(rand_augment(9, count=1), white, 60)])
    assert (grey == 128).all(axis=1).any()
    assert not (grey == 0).all(axis=1).any()
    assert (black == 0).all(axis=1).any()


def test_what_has_to_be_decoded() -> None:
    """Evaluation sees whole pictures; training as much as its smallest crop needs."""
    assert ImageTransform("clip", SIZE, train=False).smallest_side is None
    assert ImageTransform("clip", SIZE, train=True).smallest_side == SIZE
    assert ImageTransform("albef", SIZE, train=True).smallest_side == SIZE
    assert ImageTransform("clip_randaug", SIZE, train=True).smallest_side is None
    for name in ("albef_randaug", "blip_randaug_pretrain"):
        side = ImageTransform(name, SIZE, train=True).smallest_side
        assert side is not None
        area = RECIPES[name].crop_area
        assert area is not None
        boxes = [crop_box(side, side, area, generator(i)) for i in range(300)]
        assert min(min(height, width) for _, _, height, width in boxes) >= SIZE - 1


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (300, 2)])
@pytest.mark.parametrize("name", ["clip", "albef", "clip_randaug", "albef_randaug_pretrain"])
def test_extreme_shapes_pass(name: str, shape: tuple[int, int]) -> None:
    result = ImageTransform(name, SIZE, train=True)(picture(*shape), generator())
    assert result.shape == (3, SIZE, SIZE)
