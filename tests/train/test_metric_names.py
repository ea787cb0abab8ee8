"""The metrics of runs are those of the table in sdkit/language/metric_names.py, from which docs/metrics.md is written."""

import subprocess
import sys
from pathlib import Path

import pytest
from attrs import evolve
from tinyruns import COLUMNS, distil, lines, make_spec, rollout, rows, teacher, train, training, with_evaluation

from sdkit.language.metric_names import FAMILIES, INTERVAL_SUFFIXES, LENGTH_METRIC, METRICS, SINGLE, metric_named
from sdkit.language.specs import (
    ChatTurns,
    ClipSpec,
    CrossEntropy,
    DataSpec,
    DivergenceClip,
    EmaWeights,
    GroupRelative,
    ImportanceSpec,
    InlineSource,
    InstructionSuite,
    MixtureSamples,
    NextTurns,
    NonEmpty,
    OldPolicyRatio,
    PolicyGradient,
    PolicyImportance,
    ReferenceKl,
    RetryEnvironment,
    ReverseKl,
    RouteSpec,
    SamplerRatio,
    Schedule,
    StartsWith,
    StudentSamples,
    SuccessfulSibling,
    Table,
    TopKSupport,
    UserTurn,
)

ROOT = Path(__file__).parents[2]
OF_SERVERS_AND_VLLM = {f"rollout/{name}" for name in ("staleness", "servers", "canary_mean", "canary_max")}
OF_SERVERS_AND_VLLM |= {"time/sampler"}  # tests/serving and tests/sampling have these
OF_WRITERS = {"teacher/writer_failed", "time/writer"}  # test_written_contexts.py has these
OF_GPUS = {"memory/device_allocated_gib", "memory/device_reserved_gib", "time/mfu"}


@pytest.fixture(scope="module")
def routed(tiny_folder):
    """A spec with a route, filters, slots, schedules, rewards, suites, an environment, demonstrated turns, a panel and a lift."""
    game = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}] * 2
    source = InlineSource(rows=tuple(Table({**row, "game": game}) for row in rows()))
    columns = Table({**COLUMNS, "game": ChatTurns(turns="game")})
    slots = Table({"sibling": SuccessfulSibling(threshold=0.0), "next": NextTurns()})
    sees = UserTurn(template="{prompt} {sibling} {next}", slots=slots, requires="any")
    moving = Schedule(start=0.1, to=0.2, steps=2)
    spec = with_evaluation(
        make_spec(
            tiny_folder,
            teacher=teacher(EmaWeights(update_rate=moving), sees),
            losses=Table(dict(distil(coefficient=moving)) | {"imitate": CrossEntropy()}),
            data=DataSpec(source=source, columns=columns),
            rollout=rollout(
                completions_per_prompt=2,
                keep=(NonEmpty(),),
                sampled_by=StudentSamples(starts_with=StartsWith(column="game", turns_left=1.0)),
            ),
            route=RouteSpec(when="failed", then=("imitate",), otherwise=("distil",)),
        ),
        panel=(InstructionSuite(size=2, max_new_tokens=2),),
    )
    environment = RetryEnvironment(max_turns=2)
    return evolve(spec, reward="number", environment=environment, training=evolve(spec.training, steps=1))


@pytest.fixture(scope="module")
def rewarded(tiny_folder):
    """A spec with a policy gradient, a reference KL, a top-k divergence, clips, ratios and a mixture of samplers."""
    sampler = SamplerRatio(cap=2.0, level="token")
    top_k = distil(
        divergence=ReverseKl(),
        support=TopKSupport(k=4, chosen_by="student", remainder="tail_bucket"),
        clip=DivergenceClip(token=5.0),
        importance=ImportanceSpec(old_policy=OldPolicyRatio(cap=2.0), sampler=sampler),
    )
    pull = PolicyGradient(
        advantage=GroupRelative(),
        clip=ClipSpec(low=0.2, high=0.2, dual=3.0),
        importance=PolicyImportance(sampler=sampler),
    )
    spec = with_evaluation(
        make_spec(
            tiny_folder,
            losses=Table(dict(top_k) | {"pull": pull, "anchor": ReferenceKl(estimator="k2")}),
            rollout=rollout(completions_per_prompt=2, sampled_by=MixtureSamples(student_share=1.0)),
            training=training(steps=1, updates_per_rollout=2),
        ),
        teacher_lift=0,
    )
    return evolve(spec, reward="number")


@pytest.fixture(scope="module")
def names(routed, rewarded, tmp_path_factory):
    """The names of all metrics of a run of each spec."""
    folders = [train(spec, tmp_path_factory.mktemp("metrics") / "run") for spec in (routed, rewarded)]
    return [{name for line in lines(folder / "metrics.jsonl") for name in line} for folder in folders]


def test_every_metric_of_a_run_is_in_the_table(names):
    assert [name for name in set().union(*names) if metric_named(name) is None] == []


def test_every_entry_of_the_table_is_a_metric_of_a_run(names):
    written = {metric_named(name) for name in set().union(*names)}
    assert {metric.name for metric in METRICS if metric not in written} == OF_SERVERS_AND_VLLM | OF_WRITERS | OF_GPUS


def test_reserved_names_are_those_of_a_run(names, routed):
    first = {name.partition("/")[0] for name in names[0] if "/" in name} - set(routed.losses)
    assert first == FAMILIES
    assert {name for name in names[0] if "/" not in name} == SINGLE
    scores = {name for name in names[0] if name.startswith("eval/sums/greedy/")}
    assert f"eval/sums/greedy/{LENGTH_METRIC}" in scores
    assert {f"eval/sums/greedy/right{end}" for end in INTERVAL_SUFFIXES} <= scores


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("distil/k1", "TERM/k1"),
        ("eval/distil/k1", "eval/METRIC"),
        ("eval/words/distil/k1", "eval/SUITE/METRIC"),
        ("eval/words/drawn/right_low", "eval/SUITE/DECODING/REWARD"),
        ("teacher/weights/update_rate", "teacher/KEY"),
        ("teacher/hint_used", "teacher/SLOT_used"),
        ("loss", "loss"),
        ("losses", None),
        ("rollout/nothing", None),
    ],
)
def test_names_stand_for_entries(name, entry):
    found = metric_named(name)
    assert (found and found.name) == entry


def test_page_is_written_from_the_table():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/freeze_metrics.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
