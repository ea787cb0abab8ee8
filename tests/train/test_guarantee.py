"""What `validate` accepts runs two steps; what it refuses has a place; specs are drawn over the whole language."""

import io
import os
from unittest import mock

import generated
import pytest
import yaml
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from rich.console import Console

from sdkit.language.load import load_spec
from sdkit.language.show import annotated
from sdkit.train import smoke as smoke_module
from sdkit.train.smoke import smoke

FEW = settings(
    max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
"""About a fifth of the drawn specs are accepted, and run."""
MANY = settings(FEW, max_examples=int(os.environ.get("SDKIT_EXAMPLES", "2000")))


def run_if_accepted(page, folder):
    """Checks one drawn spec; returns whether it ran."""
    path, shown = folder / "page.yaml", folder / "shown.yaml"
    path.write_text(yaml.safe_dump(page, sort_keys=False))
    checked = load_spec(path)
    assert all(problem.place and problem.message for problem in checked.problems)
    if not checked.ok:
        return False
    shown.write_text(annotated(checked))
    assert load_spec(shown).spec == checked.spec
    lines = smoke(checked.spec, Console(file=io.StringIO()), 2)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    return True


def losses_in_micro_batches(spec, tokens):
    """Returns the losses of a smoke run with micro-batches of up to so many tokens, each reported before its update."""
    small = smoke_module._small_training

    def with_budget(*args):
        return evolve(small(*args), micro_batch_tokens=tokens)

    with mock.patch.object(smoke_module, "_small_training", with_budget):
        lines = smoke(spec, Console(file=io.StringIO()), 1, dtype="float32")
        return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drawn")


@given(page=generated.method_pages())
@FEW
def test_accepted_method_pages_run(folder, page):
    run_if_accepted(page, folder)


@given(page=generated.run_files())
@FEW
def test_accepted_run_files_run(folder, page):
    run_if_accepted(page, folder)


@given(page=generated.method_pages())
@settings(FEW, max_examples=60)
def test_micro_batches_do_not_change_the_loss(folder, page):
    path = folder / "page.yaml"
    path.write_text(yaml.safe_dump(page, sort_keys=False))
    if (checked := load_spec(path)).ok:
        expected = losses_in_micro_batches(checked.spec, 2048)
        assert losses_in_micro_batches(checked.spec, 1) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.full
@given(page=generated.method_pages() | generated.run_files())
@MANY
def test_accepted_specs_run_many(folder, page):
    run_if_accepted(page, folder)
