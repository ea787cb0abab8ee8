"""A whole run: what it leaves behind, that it repeats itself, and that a stopped one goes on as if nothing had been."""

import json
import os
import signal

import pytest
import torch
from tinyruns import (
    LORA,
    advance,
    distil,
    evaluated,
    inline,
    lines,
    make_spec,
    metrics,
    model,
    rollout,
    rollouts_of,
    same,
    teacher,
    train,
    training,
    weights_of,
)

from sdkit.language.errors import BadData, NumericsGuard, RunFailed, Stopped, UnreadableInput
from sdkit.language.specs import (
    CrossEntropy,
    DatasetSamples,
    EmaWeights,
    FrozenWeights,
    OptimizerSpec,
    OutputSpec,
    Suite,
    Table,
    TeacherSamples,
)
from sdkit.train.inputs import RunData
from sdkit.train.report import Report

EMA = teacher(EmaWeights(update_rate=0.3))


def status(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.fixture(scope="module")
def full_spec(tiny_folder):
    output = OutputSpec(samples_every=2, samples=2, tensorboard=True)
    return evaluated(make_spec(tiny_folder, teacher=EMA, output=output), every=2)


@pytest.fixture(scope="module")
def done(full_spec, tmp_path_factory):
    return train(full_spec, tmp_path_factory.mktemp("runs") / "run")


def test_the_spec_is_kept_as_written_and_as_resolved(done, full_spec):
    from sdkit.language.resolved import resolved

    assert (done / "spec.yaml").read_text() == "# as written\n"
    assert json.loads((done / "resolved.yaml").read_text()) == json.loads(json.dumps(resolved(full_spec)))


def test_provenance(done):
    kept = json.loads((done / "provenance.json").read_text())
    assert {"argv", "started", "python", "platform", "versions", "git"} <= kept.keys()
    assert {"torch", "transformers", "deepspeed"} <= kept["versions"].keys()
    assert kept["seed"] == 0
    assert set(kept["data"]) == {"train", "suite sums", "suite more"}
    assert all(len(digest) == 64 for digest in kept["data"].values())
    assert kept["model"]["located"]


def test_status_is_done(done):
    assert status(done)["state"] == "done"
    assert status(done)["step"] == 3


def test_metrics_are_one_object_a_line(done):
    trained = [line for line in lines(done / "metrics.jsonl") if "grad_norm" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    for line in trained:
        assert {"loss", "lr", "distil/forward_kl", "teacher_distance", "reward/right"} <= line.keys()
        assert {"rollout/completion_tokens", "time/step", "memory/peak_gib"} <= line.keys()
        assert all(isinstance(value, int | float) for value in line.values())
    assert [line["tokens_generated"] for line in trained] == sorted(line["tokens_generated"] for line in trained)


def test_evaluations_stand_at_both_ends_and_in_between(done):
    found = [line for line in lines(done / "metrics.jsonl") if "eval/score" in line]
    assert [line["step"] for line in found] == [0, 2, 3]
    for line in found:
        for name in ("eval/score", "eval/sums/greedy/right", "eval/sums/drawn/number"):
            assert line[f"{name}_low"] <= line[name] <= line[f"{name}_high"]
            assert line[f"{name}_n"] == 4
        assert line["eval/more/sampled/number_n"] == 3
        assert line["eval/score"] == line["eval/sums/greedy/right"]
        assert {"eval/loss", "eval/distil/forward_kl", "eval/more/loss"} <= line.keys()
    (lift,) = [line for line in lines(done / "metrics.jsonl") if "lift/sums/greedy/right" in line]
    assert lift["step"] == 0


def test_every_completion_and_its_scores_are_kept(done):
    assert sorted(p.name for p in (done / "evaluations").iterdir()) == [
        f"step_00000{step}.jsonl" for step in (0, 2, 3)
    ]
    records = lines(done / "evaluations" / "step_000003.jsonl")
    assert len(records) == 4 * (1 + 2) + 3 * 2
    keys = {"suite", "decoding", "row", "prompt", "completion", "scores", "feedback"}
    assert keys == records[0].keys()
    kept = [r["scores"]["number"] for r in records if (r["suite"], r["decoding"]) == ("sums", "drawn")]
    measured = metrics(done)[-1]["eval/sums/drawn/number"]
    assert sum(kept) / len(kept) == pytest.approx(measured)


def test_rollouts_and_samples(done):
    for step in range(3):
        (records,) = [lines(done / "rollouts" / f"step_{step:06d}.jsonl")]
        assert len(records) == 4
        for record in records:
            assert record["sampled_from_ids"] == record["prompt_ids"] != record["teacher_prompt_ids"]
            assert len(record["completion_ids"]) == len(record["sampler_logprobs"])
            assert record["policy_version"] == step
    assert [p.name for p in sorted((done / "samples").iterdir())] == ["step_000001.jsonl", "step_000003.jsonl"]
    for sample in lines(done / "samples" / "step_000001.jsonl"):
        assert "Example:" in sample["teacher_prompt"]
        assert "Example:" not in sample["prompt"]
        assert sample["prompt"].endswith("<|im_start|>assistant\n")
        assert set(sample["rewards"]) == {"right", "number"}
        assert isinstance(sample["completion"], str)


def test_tensorboard_has_the_same_figures(done):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(done / "tensorboard")).Reload()
    drawn = {event.step: event.value for event in events.Scalars("loss")}
    kept = {m["step"]: m["loss"] for m in metrics(done) if "loss" in m}
    assert drawn == pytest.approx(kept, rel=1e-5)
    assert len(events.Scalars("eval/score")) == 3


def test_plot_and_result(done):
    assert (done / "plot.png").read_bytes()[:4] == b"\x89PNG"
    result = json.loads((done / "result.json").read_text())
    assert len(result) == 2 * 2 + 2 * 1
    assert result[0]["n"] == 4
    assert result[0]["after"][0] - result[0]["before"][0] == pytest.approx(result[0]["change"][0])


def test_the_model_is_the_trained_one(done, tiny_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(done / "model")
    start = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(done / "model")
    assert tokenizer.chat_template
    ids = tokenizer("What is 3 + 9?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert (trained(ids).logits - start(ids).logits).abs().max() > 1e-2
    for name, value in weights_of(done).items():
        same(value, trained.get_parameter(name).detach())


def test_nothing_half_written_remains(done):
    assert not [p for p in done.rglob("*") if "partial" in p.name]


def test_the_same_spec_gives_the_same_run(done, full_spec, tmp_path):
    again = train(full_spec, tmp_path / "again")
    assert metrics(again) == metrics(done)
    for name, value in weights_of(done).items():
        same(weights_of(again)[name], value)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_another_seed_gives_another_run(tiny_folder, tmp_path, lora):
    runs = [
        train(
            make_spec(tiny_folder, model=model(tiny_folder, lora=lora), training=training(steps=1, seed=s)),
            tmp_path / str(i),
        )
        for i, s in enumerate((3, 3, 4))
    ]
    first, again, other = map(metrics, runs)
    assert first == again
    assert first != other


def test_a_run_is_never_overwritten_unasked(full_spec, tmp_path):
    spec = make_spec(full_spec.model.path, training=training(steps=1))
    folder = train(spec, tmp_path / "run")
    with pytest.raises(UnreadableInput, match="exists"):
        train(spec, folder)
    (folder / "old").touch()
    train(spec, folder, overwrite=True)
    assert not (folder / "old").exists()
    assert status(folder)["state"] == "done"


def test_a_folder_that_is_not_a_run_is_left_alone(full_spec, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("precious")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UnreadableInput):
            train(full_spec, folder, **options)
    assert [p.name for p in folder.iterdir()] == ["chapter.tex"]


def test_bad_data_leave_no_folder(tiny_folder, tmp_path):
    spec = make_spec(tiny_folder, rollout=rollout(max_prompt_tokens=3))
    with pytest.raises(BadData, match="more than 3"):
        train(spec, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def long_spec(folder, dtype="float32", stage=0, lora=None):
    return evaluated(
        make_spec(
            folder,
            model=model(folder, dtype, lora),
            teacher=EMA,
            training=training(steps=4, zero_stage=stage),
            optimizer=OptimizerSpec(lr=3e-3, lr_scheduler_type="linear", warmup_steps=1),
            output=OutputSpec(checkpoint_every=2, tensorboard=False),
        ),
        every=2,
    )


def stop_after(monkeypatch, step, how):
    """Have `how` happen while the report of this step is written."""
    report = Report.step

    def reported(self, done, *args):
        report(self, done, *args)
        if done == step:
            how()

    monkeypatch.setattr(Report, "step", reported)


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


def crashed():
    raise RuntimeError("the power went")


FORMS = [("float32", 0, None), ("bfloat16", 1, None), ("float32", 1, LORA)]


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: f"{form[0]}-{form[1]}-{form[2] and 'lora'}")
def straight(request, tiny_folder, tmp_path_factory):
    spec = long_spec(tiny_folder, *request.param)
    return spec, train(spec, tmp_path_factory.mktemp("straight") / "run")


@pytest.mark.parametrize(
    ("step", "how", "error", "state"),
    [(2, terminated, Stopped, "stopped"), (3, terminated, Stopped, "stopped"), (3, crashed, RunFailed, "failed")],
    ids=["asked after 2", "asked after 3", "crashed after 3"],
)
def test_a_resumed_run_is_the_run(straight, tmp_path, monkeypatch, step, how, error, state):
    spec, whole = straight
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, step, how)
        with pytest.raises(error) as caught:
            train(spec, folder)
    assert status(folder)["state"] == state
    if error is Stopped:
        assert caught.value.exit_code == 7
        assert "--resume" in caught.value.hint
    train(spec, folder, resume=True)
    assert status(folder)["state"] == "done"
    assert metrics(folder) == metrics(whole)
    for name, value in weights_of(whole).items():
        same(weights_of(folder)[name], value)
    assert (folder / "result.json").read_text() == (whole / "result.json").read_text()
    for kept in ("rollouts", "samples", "evaluations"):
        texts = [{p.name: p.read_text() for p in (f / kept).iterdir()} for f in (folder, whole)]
        assert texts[0] == texts[1]


def test_a_run_without_checkpoints_cannot_be_resumed(done, full_spec):
    with pytest.raises(UnreadableInput, match="no checkpoint to resume from"):
        train(full_spec, done, resume=True)
    assert status(done)["state"] == "done"


def test_the_last_step_is_not_stopped_before_its_end(tiny_folder, tmp_path, monkeypatch):
    stop_after(monkeypatch, 1, terminated)
    folder = train(make_spec(tiny_folder, training=training(steps=1)), tmp_path / "run")
    assert status(folder)["state"] == "done"


@pytest.mark.parametrize("weights", ["student", "teacher"])
@pytest.mark.parametrize("prompt", ["student", "teacher"])
def test_weights_and_prompt_of_the_sampler(open_tiny, weights, prompt):
    trainer = open_tiny(
        teacher=teacher(FrozenWeights()),
        rollout=rollout(sampled_by=TeacherSamples(weights=weights, prompt=prompt)),
        optimizer=OptimizerSpec(lr=1e-2),
    )
    advance(trainer)
    for r in rollouts_of(trainer, 3):
        seen = {
            (w, p): logprobs(of, ids, r.completion_ids)
            for w, of in (("student", trainer.models.student), ("teacher", trainer.models.teacher.weights))
            for p, ids in (("student", r.prompt_ids), ("teacher", r.teacher_prompt_ids))
        }
        for pair, expected in seen.items():
            apart = (torch.tensor(r.sampler_logprobs) - expected).abs().max()
            assert (apart < 1e-4) == (pair == (weights, prompt))


def logprobs(weights, prompt, completion):
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad(), weights.active() as causal:
        told = causal(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return told.gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("weights", ["student", "teacher"])
@pytest.mark.parametrize("prompt", ["student", "teacher"])
def test_a_whole_run_sampled_by(tiny_folder, tmp_path, weights, prompt):
    sampler = TeacherSamples(weights=weights, prompt=prompt)
    spec = make_spec(tiny_folder, teacher=EMA, rollout=rollout(sampled_by=sampler), training=training(steps=2))
    folder = train(spec, tmp_path / "run")
    name = "prompt_ids" if prompt == "student" else "teacher_prompt_ids"
    for record in lines(folder / "rollouts" / "step_000001.jsonl"):
        assert record["sampled_from_ids"] == record[name]
    assert status(folder)["state"] == "done"


def test_the_data_sets_own_completions(tiny_folder, tiny_tokenizer, tmp_path):
    spec = make_spec(
        tiny_folder,
        teacher=None,
        rollout=rollout(sampled_by=DatasetSamples(), max_new_tokens=32),
        losses=Table({"imitate": CrossEntropy()}),
        optimizer=OptimizerSpec(lr=3e-3),
        training=training(steps=6),
    )
    folder = train(spec, tmp_path / "run")
    for record in lines(folder / "rollouts" / "step_000000.jsonl"):
        n = record["row"]
        assert tiny_tokenizer.decode(record["completion_ids"]) == f"{n} + {n} = {2 * n}<|im_end|>"
        assert record["sampler_logprobs"] is None
        assert record["finished"]
    losses = [line["loss"] for line in metrics(folder)]
    assert losses[-1] < losses[0]


def test_three_bad_gradients_in_a_row_end_a_run(tiny_folder, tmp_path):
    spec = make_spec(tiny_folder, optimizer=OptimizerSpec(lr=1e6, max_grad_norm=1e12), training=training(steps=9))
    with pytest.raises(NumericsGuard, match="3 optimizer steps in a row") as caught:
        train(spec, tmp_path / "run")
    assert caught.value.exit_code == 8
    assert status(tmp_path / "run")["state"] == "failed"
    assert "optimizer steps in a row" in status(tmp_path / "run")["reason"]
    skipped = [line["skipped_steps"] for line in metrics(tmp_path / "run")]
    assert skipped == [0, 1, 1]


def test_a_run_with_adapters_leaves_the_adapter_and_a_merged_model(tiny_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    spec = make_spec(
        tiny_folder,
        model=model(tiny_folder, lora=LORA),
        teacher=EMA,
        optimizer=OptimizerSpec(lr=1e-2),
        losses=distil(),
    )
    folder = train(spec, tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(folder / "model")
    start = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        before = start(ids).logits
        with_adapter = PeftModel.from_pretrained(start, str(folder / "adapter"))(ids).logits
        torch.testing.assert_close(merged(ids).logits, with_adapter, atol=1e-4, rtol=1e-4)
        assert (with_adapter - before).abs().max() > 1e-2
    assert not any("lora" in name for name in weights_of(folder))


@pytest.mark.parametrize(("choice", "left"), [("drop", 2), ("keep", 6)])
def test_a_suite_may_keep_its_prompts_in_training(tiny_folder, tiny_tokenizer, tmp_path, choice, left):
    """Four of the six training rows are held out too."""
    suite = Suite(data=inline(4), score="right", same_prompts=choice)
    spec = evaluated(make_spec(tiny_folder), suites=Table({"sums": suite}))
    assert len(RunData(spec, tmp_path, tiny_tokenizer).train) == left
