"""The metric names of a run are those of sdkit/language/metric_names.py."""

from attrs import evolve
from tinyruns import distil, lines, make_spec, rollout, teacher, train, with_evaluation

from sdkit.language.metric_names import FAMILIES, INTERVAL_SUFFIXES, LENGTH_METRIC, SINGLE
from sdkit.language.specs import (
    CrossEntropy,
    EmaWeights,
    NonEmpty,
    RouteSpec,
    Schedule,
    SuccessfulSibling,
    Table,
    UserTurn,
)


def test_run_writes_exactly_the_listed_metric_families(tiny_folder, tmp_path):
    """The run has every source of metrics: a route, filters, slots, schedules, rewards, suites, a teacher lift."""
    sees = UserTurn(template="{prompt} {sibling}", slots=Table({"sibling": SuccessfulSibling(threshold=0.0)}))
    moving = Schedule(start=0.1, to=0.2, steps=2)
    spec = with_evaluation(
        make_spec(
            tiny_folder,
            teacher=teacher(EmaWeights(update_rate=moving), sees),
            losses=Table(dict(distil(coefficient=moving)) | {"imitate": CrossEntropy()}),
            rollout=rollout(completions_per_prompt=2, keep=(NonEmpty(),)),
            route=RouteSpec(when="failed", then=("imitate",), otherwise=("distil",)),
        )
    )
    spec = evolve(spec, reward="number", training=evolve(spec.training, steps=1))
    train(spec, tmp_path / "run")
    names = {name for line in lines(tmp_path / "run" / "metrics.jsonl") for name in line}
    first = {name.partition("/")[0] for name in names if "/" in name} - set(spec.losses)
    assert first == FAMILIES
    assert {name for name in names if "/" not in name} - {"loss"} == SINGLE
    scores = {name for name in names if name.startswith("eval/sums/greedy/")}
    assert f"eval/sums/greedy/{LENGTH_METRIC}" in scores
    assert {f"eval/sums/greedy/right{end}" for end in INTERVAL_SUFFIXES} <= scores
