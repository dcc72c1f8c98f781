"""Every tensor of every reference case, at rtol 1e-4 and atol 1e-5 in float32."""

import pytest
import torch
from torch import Tensor

from tests.parity.cases import GOLDEN, Case, find_cases
from tests.parity.compute import compute, own_key
from tests.parity.conftest import Row

RTOL, ATOL = 1e-4, 1e-5
CASES = find_cases()


def test_there_are_cases() -> None:
    assert CASES, f"no case folder below {GOLDEN}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, parity_rows: list[Row]) -> None:
    ours = compute(case)
    problems, groups = [], {"forward": _Worst(), "gradients": _Worst()}
    for name, expected in case.outputs.items():
        key = own_key(case, name)
        if key not in ours:
            problems.append(f"{name}: not computed")
            continue
        found = ours[key]
        if (found.shape or (1,)) != (expected.shape or (1,)):
            problems.append(f"{name}: shape {list(found.shape)}, expected {list(expected.shape)}")
            continue
        worst = groups["gradients" if name.startswith("grad") else "forward"]
        share = worst.add(found.reshape(expected.shape), expected)
        if not share <= 1:
            problems.append(f"{name}: {share:.3g} times the bound")
    parity_rows += [worst.row(case.name, group) for group, worst in groups.items()]
    assert not problems, "\n".join([case.name, *problems])


class _Worst:
    """Largest differences over a group of tensors."""

    def __init__(self) -> None:
        self.count, self.absolute, self.relative, self.share = 0, 0.0, 0.0, 0.0

    def add(self, found: Tensor, expected: Tensor) -> float:
        """Largest |difference| as a share of `ATOL + RTOL * |expected|`; infinite where one is NaN."""
        found, expected = found.double(), expected.double()
        difference = (found - expected).abs()
        share = float((difference / (ATOL + RTOL * expected.abs())).max()) if found.numel() else 0.0
        share = float("inf") if torch.isnan(difference).any() else share
        self.count += 1
        self.share = max(self.share, share)
        if found.numel():
            self.absolute = max(self.absolute, float(difference.max()))
            self.relative = max(
                self.relative, float(difference.max() / expected.abs().max().clamp_min(1e-30))
            )
        return share

    def row(self, case: str, group: str) -> Row:
        return case, group, self.count, self.absolute, self.relative, self.share
