"""One process group for all engine tests, and worlds on the tiny model."""

import pytest
from tinyruns import make_spec


@pytest.fixture(scope="session")
def _leave_at_the_end():
    yield
    from sdkit.engine import zero

    zero.stop()


@pytest.fixture
def process_group(_leave_at_the_end):
    """DeepSpeed's process group of one; a whole run leaves it, so each test joins anew where it must."""
    from sdkit.engine import zero

    zero.start()


@pytest.fixture
def open_tiny(tiny_folder, process_group, tmp_path):
    """Open a world from changes to the small run; closed at the end of the test."""
    from sdkit.engine.run import open_world

    worlds = []

    def opened(spec=None, **changes):
        worlds.append(open_world(spec or make_spec(tiny_folder, **changes), tmp_path))
        return worlds[-1]

    yield opened
    for world in worlds:
        world.close()
