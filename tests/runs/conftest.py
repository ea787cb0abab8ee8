"""A fixture for run directories made by hand."""

import pytest
from run_directories import write_run


@pytest.fixture
def make_run(tmp_path):
    """Writes a run directory below the test's folder with these evaluations: step -> score of each prompt."""

    def make(name, evaluations, **facts):
        return write_run(tmp_path / name, evaluations, **facts)

    return make
