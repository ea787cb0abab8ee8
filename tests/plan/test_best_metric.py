"""What `output.keep_best` can name, which values are better, and that a plan says so and what may end the run early."""

from pathlib import Path

import pytest
from attrs import evolve

from sdkit.language.best_metric import best_metric, best_metrics
from sdkit.language.load import load_spec
from sdkit.language.specs import CollapseSpec, ScoreCollapse, StepCollapse
from sdkit.plan.accelerators import Machine
from sdkit.plan.plan import make_plan
from sdkit.plan.text import render_plan

SPEC = load_spec(Path(__file__).parents[1] / "ok" / "better_value.yaml").spec


def with_output(**changes):
    return evolve(SPEC, output=evolve(SPEC.output, **changes))


BETTER = {
    "score": "higher",
    "loss": "lower",
    "held_out/sampled/right": "higher",
    "held_out/sampled/pass_at_4": "higher",
    "held_out/sampled/cut_at_limit": "lower",
    "held_out/sampled/self_repetition": "lower",
}


@pytest.mark.parametrize(("name", "better"), BETTER.items())
def test_scores_are_better_when_higher_and_losses_when_lower(name, better):
    assert best_metric(with_output(keep_best=name, best_is=None)) == (f"eval/{name}", better)


def test_other_measures_have_no_better_value():
    names = best_metrics(SPEC)
    assert {name.rpartition("/")[2] for name in names if names[name] is None} == {
        "entropy",
        "distinct_1",
        "distinct_2",
        "completion_tokens",
    }
    assert best_metric(SPEC) == ("eval/held_out/sampled/entropy", "higher")
    assert best_metric(with_output(keep_best=None, best_is=None)) is None


def plan_of(spec):
    return render_plan(spec, make_plan(spec, Machine(), None))


def test_plan_says_what_may_end_the_run():
    collapse = CollapseSpec(entropy=StepCollapse(action="stop"), score=ScoreCollapse(action="stop"))
    assert "rollout batches: 10, fewer if entropy or score collapses\n" in plan_of(with_output(collapse=collapse))
    for spec in (SPEC, with_output(collapse=collapse, tripwire_steps=None)):
        assert "rollout batches: 10\n" in plan_of(spec)
