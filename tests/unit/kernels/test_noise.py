"""The managers' noise: the generator's published numbers, its distribution, independence of streams."""

import pytest
import torch
from torch import Tensor

from mt_deepspeed.kernels.manager_aggregation.noise import philox, philox_normal

COUNT = (4, 2048, 64)


def _words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_numbers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Known answers of Random123, the generator's own library."""
    assert philox(_words(*counter), _words(*key)) == _words(*expected)  # type: ignore[arg-type]


def _normals(seed: int, offset: int = 0, first_expert: int = 0) -> Tensor:
    return philox_normal(torch.tensor([seed]), offset, *COUNT, torch.float64, first_expert)


def test_distribution() -> None:
    normals = _normals(seed=3)
    count = normals.numel()
    assert abs(normals.mean()) < 4 / count**0.5
    assert abs(normals.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((normals**3).mean()) < 4 * (15 / count) ** 0.5
    assert abs((normals**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert 4.2 < normals.abs().max() < 4.86
    # Kolmogorov-Smirnov: the largest distance between the distribution functions.
    values = normals.flatten().sort().values
    exact = torch.special.ndtr(values)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert (exact - steps).abs().max() < 1.95 / count**0.5


def test_variance_over_all_radii_and_angles_is_one() -> None:
    """Not a sample: the mean over every value the 16 bits can take."""
    midpoints = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    assert abs((-2 * midpoints.log()).mean() / 2 - 1) < 6e-6
    assert abs((2 * torch.pi * midpoints).cos().square().mean() - 0.5) < 1e-12


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"seed": 3 + 2**32},
        {"seed": 3, "offset": 1},
        {"seed": 3, "first_expert": 4},
    ],
    ids=["another rank or step", "high half of the seed", "another layer", "other experts"],
)
def test_streams_are_independent(other: dict[str, int]) -> None:
    first, second = _normals(seed=3).flatten(), _normals(**other).flatten()
    limit = 4 / first.numel() ** 0.5
    assert abs((first * second).mean()) < limit
    assert abs((first.square() - 1) @ (second.square() - 1) / first.numel()) < 2 * limit
    assert torch.unique(torch.cat([first, second])).numel() > 1.99 * first.numel()


def test_neighbours_are_independent() -> None:
    normals = _normals(seed=3)
    for moved in (normals.roll(1, 0), normals.roll(1, 1), normals.roll(1, 2), normals.roll(8, 2)):
        assert abs((normals * moved).mean()) < 4 / normals.numel() ** 0.5


def test_values_do_not_depend_on_how_many_are_asked_for() -> None:
    seed = torch.tensor([11])
    whole = philox_normal(seed, 5, 4, 9, 24)
    assert torch.equal(philox_normal(seed, 5, 2, 7, 13), whole[:2, :7, :13])
    assert torch.equal(philox_normal(seed, 5, 1, 9, 24, first_expert=3), whole[3:])


def test_offset_out_of_range() -> None:
    with pytest.raises(ValueError, match="offset 4294967296"):
        philox_normal(torch.tensor([1]), 2**32, 1, 1, 8)
