"""Another model as the teacher: scores, compared ids, sampling, and refusals."""

import json
import shutil

import pytest
import torch
from attrs import evolve
from tinyruns import (
    LORA,
    MINUS_GRADIENT,
    advance,
    assert_equal,
    distil,
    evaluate_objective,
    hidden_states,
    make_spec,
    masters,
    model,
    resize_model,
    rollout,
    rollouts_of,
    teacher,
    train,
)

from sdkit.language.errors import BadData
from sdkit.language.specs import ExternalWeights, OptimizerSpec, ReverseKl, SampledTokenSupport, TeacherSamples

ROWS = 404
"""Token ids of the tiny tokenizer, and output rows of the tiny model."""


@pytest.fixture(scope="module")
def folders(tiny_folder, other_folder, tmp_path_factory):
    """(student, teacher) folders by their numbers of output rows."""
    base = tmp_path_factory.mktemp("padded")
    wide = resize_model(tiny_folder, base / "student", ROWS + 8)
    wider = resize_model(other_folder, base / "teacher", ROWS + 16)
    return {
        "equal": (tiny_folder, other_folder),
        "student padded": (wide, other_folder),
        "teacher padded": (tiny_folder, wider),
        "both padded": (wide, wider),
    }


@pytest.fixture
def open_trainer(open_tiny, tiny_folder, other_folder):
    def make_trainer(student=tiny_folder, other=other_folder, dtype="float32", lora=None, **changes):
        return open_tiny(
            make_spec(
                student,
                model=model(student, lora=lora),
                teacher=teacher(ExternalWeights(path=str(other), dtype=dtype)),
                **changes,
            )
        )

    return make_trainer


def logprobs(folder, prompt, completion, dtype=torch.float32):
    """Log-probabilities of the tokenizer's ids at each completion token, by plain transformers.  -> [T, 404]"""
    from transformers import AutoModelForCausalLM

    causal = folder
    if not isinstance(folder, torch.nn.Module):
        causal = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    logits = causal(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1, :ROWS]
    return logits.float().log_softmax(-1)


def plain_loss(student, other, batch, divergence="forward_kl"):
    total, tokens = 0.0, 0
    for r in batch:
        s = logprobs(student, r.prompt_ids, r.completion_ids)
        with torch.no_grad():
            t = logprobs(other, r.teacher_prompt_ids, r.completion_ids)
        pair = (t, s) if divergence == "forward_kl" else (s, t)
        total = total + (pair[0].exp() * (pair[0] - pair[1])).sum()
        tokens += len(r.completion_ids)
    return total / tokens


@pytest.mark.parametrize("case", ["equal", "student padded", "teacher padded", "both padded"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_value_and_gradient_cover_the_tokenizers_ids(open_trainer, folders, case, divergence):
    from transformers import AutoModelForCausalLM

    student, other = folders[case]
    terms = distil(divergence=ReverseKl()) if divergence == "reverse_kl" else distil()
    trainer = open_trainer(student, other, losses=terms, optimizer=MINUS_GRADIENT)
    assert trainer.models.compared_ids == ROWS
    batch = rollouts_of(trainer)
    assert all(i < ROWS for r in batch for i in r.completion_ids)
    student_model = AutoModelForCausalLM.from_pretrained(student)
    expected = plain_loss(student_model, other, batch, divergence)
    expected.backward()
    assert evaluate_objective(trainer, batch)["loss"] == pytest.approx(expected.item(), abs=1e-5)
    before = masters(trainer)
    (result,) = advance(trainer, 1)
    assert result.applied
    gradient = dict(student_model.named_parameters())
    for name, value in masters(trainer).items():
        torch.testing.assert_close(before[name] - value, gradient[name].grad, atol=2e-5, rtol=1e-3)


def test_ids_beyond_the_tokenizer_are_not_sampled(open_trainer, folders):
    """Both padded models would sample them: some padding rows are as likely as any token."""
    student, other = folders["both padded"]
    hot_rollout = rollout(temperature=3.0, max_new_tokens=64)
    trainer = open_trainer(student, other, rollout=hot_rollout)
    assert max(i for r in rollouts_of(trainer) for i in r.completion_ids) < ROWS
    trainer = evolve(trainer, sampler=evolve(trainer.sampler, models=evolve(trainer.models, ids_below=None)))
    assert max(i for r in rollouts_of(trainer) for i in r.completion_ids) >= ROWS


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_external_teacher_never_changes_and_has_no_gradients(open_trainer, lora):
    trainer = open_trainer(lora=lora, optimizer=OptimizerSpec(lr=1e-2))
    weights = trainer.models.teacher.weights
    assert weights.foreign
    assert not weights.model.training
    assert not any(p.requires_grad for p in weights.model.parameters())
    before = hidden_states(trainer, weights)
    student_states = hidden_states(trainer, trainer.models.student)
    advance(trainer)
    assert_equal(hidden_states(trainer, weights), before)
    assert (hidden_states(trainer, trainer.models.student) - student_states).abs().max() > 1e-3
    assert not {id(p) for p in weights.model.parameters()} & {id(p) for _, p in trainer.learner.zero.named}
    assert trainer.models.teacher.state() == {}


def test_external_teacher_has_its_own_precision(open_trainer, other_folder):
    trainer = open_trainer(dtype="bfloat16")
    assert {p.dtype for p in trainer.models.teacher.weights.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trainer.models.student.model.parameters()} == {torch.float32}
    (result,) = advance(trainer, 1)
    assert result.applied


def test_training_on_an_external_teacher_lowers_the_loss(open_trainer):
    trainer = open_trainer(optimizer=OptimizerSpec(lr=1e-2))
    before = evaluate_objective(trainer, rollouts_of(trainer))["loss"]
    advance(trainer, 8)
    assert evaluate_objective(trainer, rollouts_of(trainer))["loss"] < 0.7 * before


def test_external_teacher_samples_as_it_would_as_a_student(open_trainer, open_tiny, other_folder):
    by = TeacherSamples(prompt="student")
    trainer = open_trainer(rollout=rollout(sampled_by=by))
    as_student = open_tiny(make_spec(other_folder))
    actual, expected = rollouts_of(trainer), rollouts_of(as_student)
    assert [r.completion_ids for r in actual] == [r.completion_ids for r in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.sampler_logprobs == pytest.approx(theirs.sampler_logprobs, abs=1e-5)


def test_sampled_token_is_scored(open_trainer, other_folder):
    losses = distil(divergence=ReverseKl(), support=SampledTokenSupport())
    trainer = open_trainer(losses=losses)
    batch = rollouts_of(trainer)
    k1 = evaluate_objective(trainer, batch)["distil/k1"]
    pairs = [
        logprobs(trainer.models.student.causal, r.prompt_ids, r.completion_ids)
        - logprobs(other_folder, r.teacher_prompt_ids, r.completion_ids)
        for r in batch
    ]
    log_ratios = [p[range(len(r.completion_ids)), r.completion_ids] for p, r in zip(pairs, batch, strict=True)]
    assert k1 == pytest.approx(torch.cat(log_ratios).mean().item(), abs=1e-5)


def test_complete_run_with_evaluation_and_checkpoints(tiny_folder, other_folder, tmp_path, process_group):
    from tinyruns import lines, with_evaluation

    spec = with_evaluation(make_spec(tiny_folder, teacher=teacher(ExternalWeights(path=str(other_folder)))))
    spec = evolve(spec, output=evolve(spec.output, checkpoint_every=1))
    folder = train(spec, tmp_path / "run")
    assert [line["step"] for line in lines(folder / "metrics.jsonl") if "grad_norm" in line] == [1, 2, 3]
    other_models = json.loads((folder / "provenance.json").read_text())["other_models"]
    assert other_models == [{"path": str(other_folder), "revision": None, "located": str(other_folder)}]


def copy_with_swapped_tokens(source, target):
    """A copy of the folder with two tokens of its vocabulary exchanged."""
    shutil.copytree(source, target)
    path = target / "tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(data))
    return target


def test_other_vocabulary_is_refused_before_weights_load(open_trainer, other_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sdkit.train.models.load_model", lambda *_: pytest.fail("weights loaded"))
    other = copy_with_swapped_tokens(other_folder, tmp_path / "swapped")
    with pytest.raises(BadData, match="another vocabulary than the student: 'a' has the id"):
        open_trainer(other=other)


def test_teacher_without_rows_for_every_token_is_refused(open_trainer, other_folder, tmp_path):
    small = resize_model(other_folder, tmp_path / "small", ROWS - 1)
    with pytest.raises(BadData, match="the teacher has 403 output rows for 404 token ids"):
        open_trainer(other=small)


def test_teacher_with_too_short_a_context_is_refused(open_trainer, other_folder, tmp_path):
    shutil.copytree(other_folder, tmp_path / "short")
    path = tmp_path / "short" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 16}))
    with pytest.raises(BadData, match="the teacher takes 16"):
        open_trainer(other=tmp_path / "short")


def test_pickled_weights_are_refused(open_trainer, other_folder, tmp_path):
    shutil.copytree(other_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(BadData, match="cannot load"):
        open_trainer(other=tmp_path / "pickled")


def test_smoke_replaces_an_external_teacher(tmp_path, process_group, tiny_folder):
    from tinyruns import silent_console

    from sdkit.train.smoke import smoke

    weights = ExternalWeights(path="org/never-there", revision="main")
    sees_nothing = make_spec("org/never-there", teacher=teacher(weights, sees=None))
    assert len(smoke(sees_nothing, silent_console())) == 2
