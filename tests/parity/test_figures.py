"""Stored values and gradients of every component of the losses, against those of a training step.

The top of cases.yaml says how each number was made.  Loss masks, advantages, collation and the student's module are
sdkit's; the model is a table of logits.
"""

import importlib
import json
import math
import sys
import typing
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from one_rank import all_gather
from torch import nn

from sdkit.batches import HiddenStateScores, LogitTransform, Rollout, RolloutBatch, Row
from sdkit.language.introspection import is_spec, keys_of, members
from sdkit.language.load import load_spec
from sdkit.language.specs import advantages, divergences, loss_parts, losses, token_weights
from sdkit.losses.chunks import token_logprobs_and_entropy
from sdkit.models.weights import Sharding
from sdkit.spans import Span
from sdkit.train.advantages import with_advantages
from sdkit.train.collate import collate
from sdkit.train.loss_masks import build_loss_masks
from sdkit.train.student import Student
from sdkit.user_code.divergences import open_user_divergences
from sdkit.user_code.token_weights import open_user_weights

HERE = Path(__file__).resolve().parent
ROW = Row(index=0, messages=({"role": "user", "content": "x"},), columns={}, raw={})
SEES = {"template": "{prompt} {hint}", "slots": {"hint": {"kind": "text", "text": "think"}}}

SINGLE_TERM_PROBLEMS = {"nothing_pulls", "unused_teacher"}
"""Problems of these terms that come only from their being the single term."""


def _generator():
    """The module tools/parity_figures.py, which shares no code with sdkit."""
    sys.path.insert(0, str(HERE.parents[1] / "tools"))
    try:
        return importlib.import_module("parity_figures")
    finally:
        sys.path.pop(0)


GENERATOR = _generator()
LONGEST, LETTERS = sys.modules["parity_batch"].LONGEST, sys.modules["parity_batch"].LETTERS
CASES = GENERATOR.cases()
FIGURES = json.loads((HERE / "figures.json").read_text(encoding="utf-8"))
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """Each case as a method page that `sdkit validate` accepts."""
    page = tmp_path_factory.mktemp("pages") / "page.yaml"
    specs_by_case = {}
    for name, case in CASES.items():
        rollout = {"completions_per_prompt": 8, "max_new_tokens": 16}
        written = {
            "rollout": rollout | {"temperature": case.get("temperature", 1.0)},
            "losses": case["losses"],
            "teacher": {"weights": "frozen", "sees": SEES},
            "route": case.get("route"),
        }
        page.write_text(yaml.safe_dump(written), encoding="utf-8")
        checked = load_spec(page, base=HERE)
        problems = [p for p in checked.problems if p.severity == "error" and p.code not in SINGLE_TERM_PROBLEMS]
        assert not problems, (name, problems)
        specs_by_case[name] = checked.spec
    return specs_by_case


class LogitTable:
    """A model whose hidden states are stored logits, and whose head is the identity: one table per prompt."""

    def __init__(self, sheets, vocabulary):
        self.model = nn.ParameterDict({k: nn.Parameter(x) for k, x in sheets.items()})
        self.head = torch.eye(vocabulary, dtype=torch.float64)

    sharding = Sharding()
    transform = LogitTransform()

    def hidden(self, sequences):
        return torch.cat([self.model[str(x.prompt[0])][list(x.positions)] for x in sequences.texts])

    selected_states = hidden

    def scores(self, sequences):
        return HiddenStateScores(hidden=self.hidden(sequences).detach(), head=self.head)


def _logit_table(rollouts, side):
    """The logits of one model for each rollout; the student's if the rollout has none."""
    vocabulary = len(rollouts[0]["student"][0])
    tables = {
        str(i): torch.tensor(r.get(side) or r["student"], dtype=torch.float64).reshape(-1, vocabulary)
        for i, r in enumerate(rollouts)
    }
    return LogitTable(tables, vocabulary)


def _rollout(place, case_rollout, rewards, tables, temperature):
    token = torch.tensor(case_rollout["completion"], dtype=torch.long)

    def statistics_of(side):
        scores = HiddenStateScores(hidden=tables[side].model[str(place)].detach(), head=tables[side].head)
        return [tuple(x.tolist()) for x in token_logprobs_and_entropy(scores, token, temperature, 100)]

    has_teacher = case_rollout.get("teacher") is not None
    statistics = {}
    for side, role in (("before", "student"), ("teacher", "teacher")):
        if side != "teacher" or has_teacher:
            statistics |= dict(zip((f"{role}_logprobs", f"{role}_entropy"), statistics_of(side), strict=True))
    return Rollout(
        row=ROW,
        group=case_rollout.get("group", place),
        prompt_ids=(place,),
        teacher_prompt_ids=(place,) if has_teacher else None,
        completion_ids=tuple(case_rollout["completion"]),
        spans=tuple(
            Span(role=role, turn=turn, start=start, end=end, body=tuple(*body) if body else None)
            for role, turn, start, end, *body in case_rollout.get("spans", ())
        ),
        sampler_logprobs=tuple(case_rollout["sampler"]) if "sampler" in case_rollout else None,
        old_logprobs=statistics["student_logprobs"] if "before" in case_rollout else None,
        policy_version=0,
        finished=True,
        reward=case_rollout.get("reward"),
        group_rewards=tuple(rewards),
        token_statistics=statistics | {k: tuple(v) for k, v in case_rollout.get("measures", {}).items()},
    )


def answer(case, spec):
    """Loss, and gradient per rollout, position and id."""
    case_rollouts, temperature = case["rollouts"], spec.rollout.temperature
    tables = {side: _logit_table(case_rollouts, side) for side in ("student", "before", "teacher", "reference")}
    rollouts = [
        _rollout(
            i, r, [x["reward"] for x in case_rollouts if "reward" in r and x["group"] == r["group"]],
            tables, temperature,
        )
        for i, r in enumerate(case_rollouts)
    ]  # fmt: skip
    batch = with_advantages(spec.losses, RolloutBatch(rollouts=tuple(rollouts)), all_gather, LONGEST)
    batch = build_loss_masks(
        batch,
        spec.losses,
        all_gather=all_gather,
        route=spec.route,
        special={3},
        functions=open_user_weights(spec.losses, HERE),
        decode=lambda ids: "".join(LETTERS[i] for i in ids),
    )
    functions = open_user_divergences(spec.losses, HERE)
    student = Student(tables["student"], temperature, 2, len(tables["student"].head), functions)
    total = torch.zeros((), dtype=torch.float64)
    for micro in collate(list(batch), spec.losses, 10, torch.clone, torch.device("cpu")).micro_batches:
        scores = tables["teacher"].scores(micro.teacher) if micro.teacher else None
        total = total + student(micro, scores, tables["reference"].scores(micro.student), spec.losses)[0]
    total.backward()
    logits = [tables["student"].model[str(i)] for i in range(len(case_rollouts))]
    gradient = [torch.zeros_like(x) if x.grad is None else x.grad for x in logits]
    return total.item(), gradient


@every_case
def test_step_matches_the_stored_value_and_gradient(specs, name):
    value, gradient = answer(CASES[name], specs[name])
    expected = FIGURES[name]
    assert value == pytest.approx(expected["value"], rel=1e-6, abs=1e-6)
    for actual, stored in zip(gradient, expected["gradient"], strict=True):
        reference = torch.tensor(stored, dtype=torch.float64).reshape(actual.shape)
        torch.testing.assert_close(actual, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "golden" in case])
def test_stored_figures_match_golden_values(name):
    golden, stored = CASES[name]["golden"], FIGURES[name]
    if "value" in golden:
        assert stored["value"] == pytest.approx(golden["value"], abs=1e-6)
    if "gradient" in golden:
        assert stored["gradient"][0][0] == pytest.approx(golden["gradient"], abs=1e-6)
    pulls = golden.get("pull", {})
    actual = list(_pulls(CASES[name], stored))
    for place, pull in pulls.items() if isinstance(pulls, dict) else enumerate(pulls):
        assert actual[place] == pytest.approx(pull, abs=1e-6)


def _pulls(case, stored):
    """The factor of ∇log S of each sampled token: −∂loss/∂z of that token's logit, divided by 1 − S."""
    for rollout, gradient in zip(case["rollouts"], stored["gradient"], strict=True):
        for y, z, logit_gradients in zip(rollout["completion"], rollout["student"], gradient, strict=True):
            share = math.exp(z[y]) / sum(map(math.exp, z))
            yield -logit_gradients[y] / (1 - share)


def test_stored_figures_match_the_generator():
    assert list(CASES) == list(FIGURES)
    for name, case in CASES.items():
        generated, stored = GENERATOR.figures(case), FIGURES[name]
        assert generated["value"] == pytest.approx(stored["value"], abs=1e-11), name
        assert _flat(generated["gradient"]) == pytest.approx(_flat(stored["gradient"]), abs=1e-11), name


def _flat(numbers):
    return [x for part in numbers for x in _flat(part)] if isinstance(numbers, list) else [numbers]


MODULES = (advantages, loss_parts, losses, divergences, token_weights)
NOT_ARITHMETIC = {("FileDivergence", key) for key in ("file", "function", "zero_when_equal", "exact_gradient")} | {("FileWeight", "file"), ("FileWeight", "function")}  # fmt: skip


def _classes():
    """Every class of the language in `MODULES` that is not a base class."""
    for module in MODULES:
        yield from (
            c
            for c in vars(module).values()
            if is_spec(c) and c.__module__ == module.__name__ and not c.__subclasses__()
        )


def _required_values(cls, key):
    """The values of a key that cases must have: each choice, null, a number that is not the default."""
    for option in members(key.type):
        origin = typing.get_origin(option)
        if origin is Literal:
            yield from typing.get_args(option)
        elif origin is tuple and typing.get_origin(typing.get_args(option)[0]) is Literal:
            yield from typing.get_args(typing.get_args(option)[0])
        elif option is bool:
            yield from (True, False)
        elif option is type(None):
            yield None
        elif not is_spec(option):
            yield "another value than the default"


def _add_covered(spec, covered):
    """Adds to `covered` every class in a spec, and (class, key, value) for each of its keys."""
    covered.add(type(spec))
    for name, key in keys_of(type(spec)).items():
        value = getattr(spec, key.field)
        values = value if isinstance(value, tuple) and name in ("given", "roles") else (value,)
        for item in values:
            if is_spec(type(item)):
                _add_covered(item, covered)
            else:
                covered.add((type(spec), name, item))
            if item != key.default:
                covered.add((type(spec), name, "another value than the default"))


def test_every_loss_component_has_a_reference_value(specs):
    covered = set()
    for spec in specs.values():
        for part in (*spec.losses.values(), *filter(None, [spec.route])):
            _add_covered(part, covered)
    missing = [
        f"{cls.__name__}.{name}: {answer}"
        for cls in _classes()
        for name, key in keys_of(cls).items()
        if (cls.__name__, name) not in NOT_ARITHMETIC
        for answer in _required_values(cls, key)
        if (cls, name, answer) not in covered
    ]
    assert missing == []
    assert set(_classes()) <= covered


def test_every_divergence_has_a_case_with_every_support_and_remainder(specs):
    """All combinations that the rules allow."""
    covered = {
        (type(t.divergence), getattr(t.support, "chosen_by", None), getattr(t.support, "remainder", None))
        for spec in specs.values()
        for t in spec.losses.values()
        if isinstance(t, losses.Distillation) and not isinstance(t.support, loss_parts.SampledTokenSupport)
    }  # fmt: skip
    support = keys_of(loss_parts.TopKSupport)
    chosen, remainders = (typing.get_args(support[k].type) for k in ("chosen_by", "remainder"))
    for divergence in members(divergences.Divergence):
        allowed = [r for r in remainders if r != "renormalize_teacher" or divergence is divergences.ForwardKl]  # fmt: skip
        required = {(divergence, by, r) for by in chosen for r in allowed} | {(divergence, None, None)}
        assert required <= covered, divergence


def test_modules_contain_every_component():
    """`MODULES` contains all classes of the unions."""
    unions = (loss_parts.Support, loss_parts.Average, losses.Advantage, losses.Loss, divergences.Divergence, token_weights.Weight)  # fmt: skip
    assert {c for union in unions for c in members(union)} <= set(_classes())
    assert losses.ClipSpec in set(_classes())
