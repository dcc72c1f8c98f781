"""Every tensor of every reference case, at rtol 1e-4 and atol 1e-5 in float32.

Gradients grow with their loss (a VQA loss is a sum over all answers), and so does the rounding of elements that
nearly cancel: where a gradient's largest element exceeds 1, atol is 1e-5 of that element. The table printed at the
end gives the share of the plain bound; it is below 1 for all cases that were at hand.
"""

import pytest
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
        found = found.reshape(expected.shape)
        worst.add(found, expected)
        scale = float(expected.abs().max().clamp_min(1.0)) if name.startswith("grad") else 1.0
        share = _share(found, expected, ATOL * scale)
        if not share <= 1:
            problems.append(f"{name}: {share:.3g} times the bound")
    parity_rows += [worst.row(case.name, group) for group, worst in groups.items()]
    assert not problems, "\n".join([case.name, *problems])


class _Worst:
    """Largest differences over a group of tensors."""

    def __init__(self) -> None:
        self.count, self.absolute, self.relative, self.share = 0, 0.0, 0.0, 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        self.count += 1
        self.share = max(self.share, _share(found, expected, ATOL))
        if found.numel():
            difference = float((found.double() - expected.double()).abs().max())
            self.absolute = max(self.absolute, difference)
            self.relative = max(self.relative, difference / max(float(expected.abs().max()), 1e-30))

    def row(self, case: str, group: str) -> Row:
        return case, group, self.count, self.absolute, self.relative, self.share


def _share(found: Tensor, expected: Tensor, atol: float) -> float:
    """Largest |difference| as a share of `atol + RTOL * |expected|`; infinite where one is NaN."""
    if not found.numel():
        return 0.0
    found, expected = found.double(), expected.double()
    share = (found - expected).abs() / (atol + RTOL * expected.abs())
    return float(share.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
