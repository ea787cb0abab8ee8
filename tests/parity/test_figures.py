"""Stored figures of every answer of the losses, value and gradient, against what a training step makes of it.

How each number was made stands at the top of cases.yaml.  Counting, advantages, collating and the student's module are
the engine's; the model is a sheet of logits.
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
from torch import nn

from sdkit.batches import HiddenStateScores, LogitTransform, Rollout, RolloutBatch, Row
from sdkit.language.introspection import is_spec, keys_of, members
from sdkit.language.load import load_spec
from sdkit.language.specs import advantages, divergences, loss_parts, losses, token_weights
from sdkit.losses.chunks import token_logprobs_and_entropy
from sdkit.models.weights import Sharding
from sdkit.train.advantages import with_advantages
from sdkit.train.collate import collate
from sdkit.train.loss_masks import build_loss_masks
from sdkit.train.student import Student
from sdkit.user_code.divergences import open_user_divergences
from sdkit.user_code.token_weights import open_user_weights

HERE = Path(__file__).resolve().parent
ROW = Row(index=0, messages=({"role": "user", "content": "x"},), columns={}, raw={})
SEES = {"template": "{prompt} {hint}", "slots": {"hint": {"kind": "text", "text": "think"}}}

ALONE = {"nothing_pulls", "unused_teacher"}
"""What is wrong with these terms only because they stand alone."""


def _generator():
    """tools/parity_figures.py, which shares nothing with sdkit."""
    sys.path.insert(0, str(HERE.parents[1] / "tools"))
    try:
        return importlib.import_module("parity_figures")
    finally:
        sys.path.pop(0)


GENERATOR = _generator()
LONGEST = sys.modules["parity_batch"].LONGEST
CASES = GENERATOR.cases()
FIGURES = json.loads((HERE / "figures.json").read_text(encoding="utf-8"))
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """Each case as a method page that `sdkit validate` accepts."""
    page = tmp_path_factory.mktemp("pages") / "page.yaml"
    found = {}
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
        problems = [p for p in checked.problems if p.severity == "error" and p.code not in ALONE]
        assert not problems, (name, problems)
        found[name] = checked.spec
    return found


class Sheet:
    """A model whose hidden states are stored logits, and whose head is the identity: one sheet per prompt."""

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


def _sheet(rollouts, side):
    """The logits of a side, by the place of the rollout; those of the student where it has none."""
    vocabulary = len(rollouts[0]["student"][0])
    sheets = {
        str(i): torch.tensor(r.get(side) or r["student"], dtype=torch.float64).reshape(-1, vocabulary)
        for i, r in enumerate(rollouts)
    }
    return Sheet(sheets, vocabulary)


def _rollout(place, written, rewards, sheets, temperature):
    token = torch.tensor(written["completion"], dtype=torch.long)

    def told(side):
        scores = HiddenStateScores(hidden=sheets[side].model[str(place)].detach(), head=sheets[side].head)
        return [tuple(x.tolist()) for x in token_logprobs_and_entropy(scores, token, temperature, 100)]

    taught = written.get("teacher") is not None
    measures = {}
    for side, whose in (("before", "student"), ("teacher", "teacher")):
        if side != "teacher" or taught:
            measures |= dict(zip((f"{whose}_logprobs", f"{whose}_entropy"), told(side), strict=True))
    return Rollout(
        row=ROW,
        group=written.get("group", place),
        prompt_ids=(place,),
        teacher_prompt_ids=(place,) if taught else None,
        completion_ids=tuple(written["completion"]),
        sampler_logprobs=tuple(written["sampler"]) if "sampler" in written else None,
        old_logprobs=measures["student_logprobs"] if "before" in written else None,
        policy_version=0,
        finished=True,
        reward=written.get("reward"),
        group_rewards=tuple(rewards),
        token_statistics=measures | {k: tuple(v) for k, v in written.get("measures", {}).items()},
    )


def answer(case, spec):
    """Loss, and gradient per rollout, position and id."""
    written, temperature = case["rollouts"], spec.rollout.temperature
    sheets = {side: _sheet(written, side) for side in ("student", "before", "teacher", "reference")}
    rollouts = [
        _rollout(
            i, r, [x["reward"] for x in written if "reward" in r and x["group"] == r["group"]],
            sheets, temperature,
        )
        for i, r in enumerate(written)
    ]  # fmt: skip
    batch = with_advantages(spec.losses, RolloutBatch(rollouts=tuple(rollouts)), _alone, LONGEST)
    batch = build_loss_masks(
        batch,
        spec.losses,
        all_gather=_alone,
        route=spec.route,
        special={3},
        functions=open_user_weights(spec.losses, HERE),
    )
    functions = open_user_divergences(spec.losses, HERE)
    student = Student(sheets["student"], temperature, 2, len(sheets["student"].head), functions)
    total = torch.zeros((), dtype=torch.float64)
    for micro in collate(list(batch), spec.losses, 10, torch.clone, torch.device("cpu")).micro_batches:
        scores = sheets["teacher"].scores(micro.teacher) if micro.teacher else None
        total = total + student(micro, scores, sheets["reference"].scores(micro.student), spec.losses)[0]
    total.backward()
    logits = [sheets["student"].model[str(i)] for i in range(len(written))]
    gradient = [torch.zeros_like(x) if x.grad is None else x.grad for x in logits]
    return total.item(), gradient


def _alone(values):
    return values, slice(0, len(values))


@every_case
def test_a_step_has_the_stored_value_and_gradient(specs, name):
    value, gradient = answer(CASES[name], specs[name])
    expected = FIGURES[name]
    assert value == pytest.approx(expected["value"], rel=1e-6, abs=1e-6)
    for own, stored in zip(gradient, expected["gradient"], strict=True):
        wanted = torch.tensor(stored, dtype=torch.float64).reshape(own.shape)
        torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "golden" in case])
def test_stored_figures_are_those_known_beforehand(name):
    golden, stored = CASES[name]["golden"], FIGURES[name]
    if "value" in golden:
        assert stored["value"] == pytest.approx(golden["value"], abs=1e-6)
    if "gradient" in golden:
        assert stored["gradient"][0][0] == pytest.approx(golden["gradient"], abs=1e-6)
    pulls = golden.get("pull", {})
    found = list(_pulls(CASES[name], stored))
    for place, pull in pulls.items() if isinstance(pulls, dict) else enumerate(pulls):
        assert found[place] == pytest.approx(pull, abs=1e-6)


def _pulls(case, stored):
    """What multiplies ∇log S of each sampled token, from −∂/∂z of that token's own logit, which is 1 − S."""
    for rollout, gradient in zip(case["rollouts"], stored["gradient"], strict=True):
        for y, z, own in zip(rollout["completion"], rollout["student"], gradient, strict=True):
            share = math.exp(z[y]) / sum(map(math.exp, z))
            yield -own[y] / (1 - share)


def test_the_stored_figures_are_the_generators():
    assert list(CASES) == list(FIGURES)
    for name, case in CASES.items():
        found, stored = GENERATOR.figures(case), FIGURES[name]
        assert found["value"] == pytest.approx(stored["value"], abs=1e-11), name
        assert _flat(found["gradient"]) == pytest.approx(_flat(stored["gradient"]), abs=1e-11), name


def _flat(numbers):
    return [x for part in numbers for x in _flat(part)] if isinstance(numbers, list) else [numbers]


MODULES = (advantages, loss_parts, losses, divergences, token_weights)
NOT_ARITHMETIC = {("FileDivergence", key) for key in ("file", "function", "zero_when_equal", "exact_gradient")} | {("FileWeight", "file"), ("FileWeight", "function")}  # fmt: skip


def _classes():
    """Every class of the language in the modules that this covers, without the bases of others."""
    for module in MODULES:
        yield from (
            c
            for c in vars(module).values()
            if is_spec(c) and c.__module__ == module.__name__ and not c.__subclasses__()
        )


def _answers(cls, key):
    """What a case must show of a key: each of its choices, its absence, a number that is not the default."""
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


def _shown(spec, found):
    """Notes every class in a spec, and (class, key, answer) of each of its keys."""
    found.add(type(spec))
    for name, key in keys_of(type(spec)).items():
        value = getattr(spec, key.field)
        each = value if isinstance(value, tuple) and name == "given" else (value,)
        for one in each:
            if is_spec(type(one)):
                _shown(one, found)
            else:
                found.add((type(spec), name, one))
            if one != key.default:
                found.add((type(spec), name, "another value than the default"))


def test_every_answer_of_the_losses_has_a_reference_value(specs):
    found = set()
    for spec in specs.values():
        for part in (*spec.losses.values(), *filter(None, [spec.route])):
            _shown(part, found)
    missing = [
        f"{cls.__name__}.{name}: {answer}"
        for cls in _classes()
        for name, key in keys_of(cls).items()
        if (cls.__name__, name) not in NOT_ARITHMETIC
        for answer in _answers(cls, key)
        if (cls, name, answer) not in found
    ]
    assert missing == []
    assert set(_classes()) <= found


def test_every_divergence_meets_every_support_and_remainder(specs):
    """Of those that rules allow together."""
    met = {
        (type(t.divergence), getattr(t.support, "chosen_by", None), getattr(t.support, "remainder", None))
        for spec in specs.values()
        for t in spec.losses.values()
        if isinstance(t, losses.Distillation) and not isinstance(t.support, loss_parts.SampledTokenSupport)
    }  # fmt: skip
    support = keys_of(loss_parts.TopKSupport)
    chosen, remainders = (typing.get_args(support[k].type) for k in ("chosen_by", "remainder"))
    for divergence in members(divergences.Divergence):
        allowed = [r for r in remainders if r != "renormalize_teacher" or divergence is divergences.ForwardKl]  # fmt: skip
        wanted = {(divergence, by, r) for by in chosen for r in allowed} | {(divergence, None, None)}
        assert wanted <= met, divergence


def test_the_coverage_would_notice_a_new_member():
    """All classes of the unions stand in the modules that are looked at."""
    unions = (loss_parts.Support, loss_parts.Average, losses.Advantage, losses.Loss, divergences.Divergence, token_weights.Weight)  # fmt: skip
    assert {c for union in unions for c in members(union)} <= set(_classes())
    assert losses.ClipSpec in set(_classes())
