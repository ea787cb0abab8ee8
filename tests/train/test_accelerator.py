"""Whole steps on a pretended accelerator (tests/support/pretended_accelerator.py).

Every tensor of a run is on the right device, and the host waits for the device no more often than stored.
`PYTHONPATH=tests/support python tests/train/test_accelerator.py` rewrites the stored numbers; read the diff.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import attrs
import pytest
from tinyruns import run_scenario

import sdkit
from sdkit.language.load import load_spec

SCENARIO = Path(__file__).parents[1] / "support" / "accelerator_scenario.py"
WAITS = Path(__file__).with_name("accelerator_waits.json")
PAGES = sorted((Path(sdkit.__file__).parent / "methods").glob("*.yaml"))
OTHERS = ("resumed", "replayed", "served", "routed")
REFUSED = ("tokens_on_the_host", "mask_on_the_host", "average_on_the_host")
FAULTS = (*REFUSED, "positions_on_the_host")


def parts(value):
    """The names of the classes that a spec is made of."""
    if attrs.has(type(value)):
        yield type(value).__name__
        value = [getattr(value, part.name) for part in attrs.fields(type(value))]
    elif hasattr(value, "values"):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from parts(one)


def cover():
    """A few pages whose losses, weights and teachers are of every class that some page has."""
    by_page = {page.stem: {*parts(spec.losses), *parts(spec.teacher)} for page, spec in specs().items()}
    missing, chosen = set().union(*by_page.values()), []
    while missing:
        chosen.append(max(by_page, key=lambda page: len(by_page[page] & missing)))
        missing -= by_page[chosen[-1]]
    return tuple(chosen)


def specs():
    return {page: load_spec(page).spec for page in PAGES}


COVER = cover()
REST = tuple(page.stem for page in PAGES if page.stem not in COVER)


def results_of(warm, folder, work, names):
    return json.loads((run_scenario(warm, SCENARIO, folder, work, names) / "results.json").read_text())


@pytest.fixture(scope="module")
def results(warm, tiny_folder, tmp_path_factory):
    return results_of(warm, tiny_folder, tmp_path_factory.mktemp("accelerator"), (*COVER, *OTHERS, *FAULTS))


def check_page(result, name):
    assert "error" not in result, result["where"]
    assert len(result["norms"]) == 2
    stored = json.loads(WAITS.read_text())
    assert name in stored or name in REST, (
        "run `PYTHONPATH=tests/support python tests/train/test_accelerator.py` to store its number of waits"
    )
    found, most = waits_of(result), stored.get(name, math.inf)
    assert found <= most, f"the host waits {found} times in a step, {most} are stored: {result['waits']}"


def waits_of(result):
    """How often the host waited; copies to the device come before any work, and do not count."""
    return sum(count for place, count in result["waits"].items() if not place.startswith("to the device"))


@pytest.mark.parametrize("name", COVER)
def test_page_runs_with_as_few_waits_as_stored(results, name):
    check_page(results[name], name)


@pytest.mark.full
def test_all_other_pages_run_with_as_few_waits_as_stored(warm, tiny_folder, tmp_path):
    others = results_of(warm, tiny_folder, tmp_path, REST)
    for name in REST:
        check_page(others[name], name)


def test_checkpoint_continues_bit_for_bit(results):
    """The student's masters and the teacher's average after the next step."""
    assert results["resumed"]["same"], results["resumed"]
    assert results["resumed"]["tensors"]


def test_replay_repeats_the_losses(results):
    recorded, again = results["replayed"]["losses"]
    assert recorded == again
    assert len(recorded) == 2


def test_served_teacher_equals_the_same_model_in_process(results):
    by_server, local = results["served"]["steps"]
    assert by_server == pytest.approx(local, abs=1e-4)


def test_routes_to_a_server_and_to_models_train(results):
    (step,) = results["routed"]["steps"]
    assert 0 < step["grad_norm"] < float("inf")


@pytest.mark.parametrize("name", REFUSED)
def test_planted_fault_is_refused(results, name):
    assert results[name]["error"].startswith("DeviceMixing")


def test_index_on_the_host_is_counted(results):
    """CUDA allows it, by a hidden transfer."""
    assert [place for place in results["positions_on_the_host"]["waits"] if place.startswith("index on the host")]


def freeze():
    """Rewrites the stored numbers of waits."""
    from sdkit.models import tiny

    with tempfile.TemporaryDirectory() as work:
        folder = tiny.build(Path(work, "model"))
        command = [sys.executable, SCENARIO, folder, work, *(page.stem for page in PAGES)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found = json.loads(Path(work, "results.json").read_text())
    stored = {name: waits_of(result) for name, result in found.items()}
    WAITS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    freeze()
