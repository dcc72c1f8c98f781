"""Prints how far each reference case was met, at the end of the session."""

import pytest
from _pytest.terminal import TerminalReporter

Row = tuple[str, str, int, float, float, float]
ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def parity_rows(request: pytest.FixtureRequest) -> list[Row]:
    """Rows (case, group, tensors, largest |difference|, relative to the tensor's maximum, of the bound)."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    rows = terminalreporter.config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("parity: largest differences")
    terminalreporter.line(f"{'case':30} {'group':12} {'tensors':>7} {'abs':>9} {'of max':>9} {'of bound':>9}")
    for case, group, count, absolute, relative, share in rows:
        terminalreporter.line(f"{case:30} {group:12} {count:7d} {absolute:9.1e} {relative:9.1e} {share:9.3f}")
