"""The objective on tensors matches a run: same loss, metrics and gradient for every method page."""

import contextlib
import functools
from pathlib import Path

import attrs
import pytest
import torch
from attrs import evolve
from tinyruns import silent_console
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer

import sdkit
from sdkit.language.specs import ExternalWeights, Table, TrustRegionBlend
from sdkit.models.loading import special_ids
from sdkit.runs.directory import read_lines
from sdkit.spans import spans_of
from sdkit.train import smoke

PAGES = sorted(Path(smoke.__file__).parents[1].joinpath("methods").glob("*.yaml"))


def logits_of(causal, records, prompt):
    """The logits that predict each completion token after the record's prompt, [N, T, V]; zeros as padding."""
    longest = max(len(r["completion_ids"]) for r in records)
    rows = []
    for record in records:
        prefix = record[prompt] or record["prompt_ids"]
        ids = torch.tensor([prefix + record["completion_ids"]])
        rows.append(
            pad(causal(input_ids=ids).logits[0, len(prefix) - 1 : -1], (0, 0, 0, longest - ids.shape[1] + len(prefix)))
        )
    return torch.stack(rows)


def padded(records, name):
    longest = max(len(r["completion_ids"]) for r in records)
    if any(r[name] is None for r in records):
        return None
    return torch.tensor([[*r[name], *[0] * (longest - len(r[name]))] for r in records])


def batch_of(records):
    """A recorded step as tensors, as another training loop would have them."""
    lengths = torch.tensor([len(r["completion_ids"]) for r in records])
    rewards = [r["reward"] for r in records]
    return sdkit.build_rollout_batch(
        padded(records, "completion_ids"),
        torch.arange(int(lengths.max())) < lengths[:, None],
        groups=torch.tensor([r["group"] for r in records]),
        rewards=None if None in rewards else torch.tensor(rewards),
        sampler_logprobs=padded(records, "sampler_logprobs"),
        has_teacher=torch.tensor([r["teacher_prompt_ids"] is not None for r in records]),
        spans=[spans_of(r.get("spans", ())) for r in records],
    )


def in_float32(spec):
    """The spec with every model in float32, so that the order of additions makes no difference."""
    if isinstance(spec, Table):
        return Table({name: in_float32(part) for name, part in spec.items()})
    if not attrs.has(type(spec)):
        return spec
    parts = {field.name: in_float32(getattr(spec, field.name)) for field in attrs.fields(type(spec))}
    return evolve(spec, **parts | ({"dtype": "float32"} if "dtype" in parts else {}))


class Models:
    """The models of a smoke run before its first step."""

    def __init__(self, folder, spec):
        self.folder, self.spec = folder, spec
        self.student = self.open("model")

    def open(self, name):
        return AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32)

    @torch.no_grad()
    def teacher(self, records):
        if self.spec.teacher is None:
            return None
        other = (self.folder / "teacher").exists()
        return logits_of(self.open("teacher" if other else "model"), records, "teacher_prompt_ids")

    @torch.no_grad()
    def partner(self, records):
        blend = self.spec.teacher and self.spec.teacher.blend
        if blend is None:
            return None
        base = isinstance(getattr(blend, "base", None), ExternalWeights)
        prompt = "teacher_prompt_ids" if isinstance(blend, TrustRegionBlend) else "prompt_ids"
        return logits_of(self.open("base" if base else "model"), records, prompt)

    @torch.no_grad()
    def reference(self, records):
        return logits_of(self.open("model"), records, "prompt_ids")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_loss_metrics_and_gradient_match_a_run(page, tmp_path, monkeypatch):
    method = sdkit.load_spec(page)
    if method.rollout.keep:
        pytest.skip("the run filters rollouts before the loss")
    if method.sees and method.sees.by_turn:
        pytest.skip("the teacher reads a row for each turn, which records do not have")
    monkeypatch.setattr(smoke.tempfile, "TemporaryDirectory", lambda prefix: contextlib.nullcontext(tmp_path))
    spec = in_float32(smoke.miniature(method, 1, tmp_path))
    monkeypatch.setattr(smoke, "miniature", lambda *_: spec)
    (step_metrics,) = smoke.smoke(method, silent_console(), steps=1)
    records = read_lines(tmp_path / "run" / "rollouts" / "step_000000.jsonl")
    models = Models(tmp_path, spec)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    objective = sdkit.build_objective(spec, step=0, special_ids=special_ids(tokenizer, ()), decode=decode)
    student = logits_of(models.student, records, "prompt_ids")
    loss, metrics = objective(
        batch_of(records),
        student,
        models.teacher(records) if objective.needs_teacher else None,
        reference_logits=models.reference(records) if objective.needs_reference else None,
        partner_logits=models.partner(records),
    )
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in models.student.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(step_metrics["grad_norm"], rel=1e-4)
    assert metrics == pytest.approx({name: step_metrics[name] for name in metrics}, rel=1e-4, abs=1e-6)
    assert loss.item() == pytest.approx(metrics["loss"])
    needs_turns = [name for name, term in spec.losses.items() if term.turn_setting or term.mask.spans]
    assert all(metrics[f"{name}/tokens"] for name in needs_turns)  # the miniature has what these terms count


def rollouts(**tensors):
    parts = {"completion_ids": torch.zeros(2, 3, dtype=torch.long), "completion_mask": torch.ones(2, 3)}
    return sdkit.build_rollout_batch(**(parts | tensors))


@pytest.mark.parametrize("mask", [torch.tensor([[1, 0, 1], [1, 1, 1]]), torch.ones(2, 2), torch.ones(3, 3)])
def test_mask_must_be_padded_on_the_right(mask):
    with pytest.raises(ValueError, match="all 1s before the first 0"):
        rollouts(completion_mask=mask)


def test_group_must_be_contiguous():
    with pytest.raises(ValueError, match="group 0 is not contiguous"):
        sdkit.build_rollout_batch(torch.zeros(3, 1).long(), torch.ones(3, 1), groups=torch.tensor([0, 1, 0]))


def test_padding_and_missing_teachers_have_no_influence():
    """Two tokens against none: the mean is over the completion that has a teacher."""
    objective = sdkit.build_objective(sdkit.load_spec("gkd"))
    mask, has_teacher = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.tensor([True, False])
    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    loss, metrics = objective(rollouts(completion_mask=mask, has_teacher=has_teacher), student, teacher)
    loss.backward()
    assert metrics["distil/tokens"] == 2
    assert student.grad[0, :2].abs().min() > 0
    assert not student.grad[0, 2].any()
    assert not student.grad[1].any()
    expected, _ = objective(
        rollouts(completion_ids=torch.zeros(1, 2).long(), completion_mask=mask[:1, :2]), student[:1], teacher[:1]
    )
    assert loss.item() == pytest.approx(expected.item())


def test_log_probabilities_can_replace_logits():
    objective = sdkit.build_objective(sdkit.load_spec("gkd", ["rollout.temperature=0.7"]))
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    loss, metrics = objective(rollouts(), student, teacher)
    expected_loss, other_metrics = objective(rollouts(), student.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(expected_loss, loss)
    assert other_metrics == pytest.approx(metrics, rel=1e-5)


def test_top_k_log_probabilities_match_the_logits():
    objective = sdkit.build_objective(sdkit.load_spec("sdft_top20_frozen", ["losses.distil.support.k=3"]))
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5).log_softmax(-1)
    top = teacher.topk(3)
    served = sdkit.TopKLogprobs(ids=top.indices, logprobs=top.values, sampled=teacher[..., 0])
    torch.testing.assert_close(objective(rollouts(), student, served)[0], objective(rollouts(), student, teacher)[0])


def test_given_advantages_replace_the_rewards():
    objective = sdkit.build_objective(sdkit.load_spec("grpo"))
    groups, student = torch.tensor([0, 0]), torch.randn(2, 3, 5)
    rewards, advantages = torch.tensor([1.0, 0.0]), torch.tensor([0.5, -0.5])
    expected = objective(rollouts(groups=groups, rewards=rewards), student)[1]
    assert objective(rollouts(advantages=advantages), student)[1] == pytest.approx(expected)
    doubled = objective(rollouts(groups=groups, rewards=rewards, advantages=2 * advantages), student)[1]
    assert doubled["policy/advantage"] == pytest.approx(2 * expected["policy/advantage"])


def test_missing_or_misshapen_input_is_named():
    objective = sdkit.build_objective(sdkit.load_spec("gkd"))
    student = torch.randn(2, 3, 5)
    for arguments, message in (
        ((student,), "this objective needs teacher"),
        ((student, student[:, :, :4]), r"teacher has the shape \[2, 3, 4\], student_logits \[2, 3, 5\]"),
        ((student[:1], student[:1]), r"must have the shape \[2, at least 3, vocabulary\], not \[1, 3, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(rollouts(), *arguments)
    blended = sdkit.build_objective(sdkit.load_spec("beta_opsd"))
    assert blended.needs_partner
    with pytest.raises(ValueError, match="needs the teacher's logits and partner_logits"):
        blended(rollouts(), student, student)


def test_schedules_have_the_value_of_the_step():
    text = "losses.distil.coefficient={from: 0, to: 1, steps: 10}"
    spec = sdkit.load_spec("gkd", [text])
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    first, middle, last = (sdkit.build_objective(spec, step)(rollouts(), student, teacher)[0] for step in (0, 5, 20))
    assert (first, middle) == (0, pytest.approx(last / 2))
