"""What the tests of the data room share."""

from pathlib import Path

import pytest

from tests.helpers.datasets import write_root


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("root"))
