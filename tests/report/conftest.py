"""A small finished run for the tests of reports."""

import pytest
from reportruns import train_small_run


@pytest.fixture(scope="session")
def report_run(tiny_folder, tmp_path_factory):
    return train_small_run(tiny_folder, tmp_path_factory.mktemp("report") / "run")
