"""A complete run: its files, that it is reproducible, and that a stopped run resumes to the same result."""

import json
import os
import signal

import pytest
import torch
from tinyruns import (
    LORA,
    advance,
    assert_equal,
    distil,
    inline,
    lines,
    make_spec,
    metrics,
    model,
    read_status,
    rollout,
    rollouts_of,
    teacher,
    train,
    training,
    weights_of,
    with_evaluation,
)

from sdkit import processes
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
from sdkit.train import run as run_module
from sdkit.train.inputs import RunData
from sdkit.train.report import Report

EMA = teacher(EmaWeights(update_rate=0.3))


@pytest.fixture(scope="module")
def full_spec(tiny_folder):
    output = OutputSpec(
        samples_every=2, samples=2, trackers=("tensorboard",), keep_best="sums/drawn/entropy", best_is="lower"
    )
    return with_evaluation(make_spec(tiny_folder, teacher=EMA, output=output), every=2)


@pytest.fixture(scope="module")
def done(full_spec, tmp_path_factory):
    return train(full_spec, tmp_path_factory.mktemp("runs") / "run")


def test_spec_is_stored_as_written_and_resolved(done, full_spec):
    from sdkit.language.resolved import resolved

    assert (done / "spec.yaml").read_text() == "# as written\n"
    assert json.loads((done / "resolved.yaml").read_text()) == json.loads(json.dumps(resolved(full_spec)))


def test_provenance_is_stored(done):
    provenance = json.loads((done / "provenance.json").read_text())
    assert {"argv", "started", "python", "platform", "versions", "git"} <= provenance.keys()
    assert {"torch", "transformers", "deepspeed"} <= provenance["versions"].keys()
    assert provenance["seed"] == 0
    assert set(provenance["data"]) == {"train", "suite sums", "suite more"}
    assert all(len(digest) == 64 for digest in provenance["data"].values())
    assert provenance["model"]["located"]


def test_status_is_done(done):
    assert read_status(done)["state"] == "done"
    assert read_status(done)["step"] == 3


def test_metrics_have_one_object_per_line(done):
    trained = [line for line in lines(done / "metrics.jsonl") if "grad_norm" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    for line in trained:
        assert {"loss", "lr", "distil/forward_kl", "teacher_distance", "reward/right"} <= line.keys()
        assert {"rollout/completion_tokens", "time/step", "memory/peak_gib"} <= line.keys()
        assert all(isinstance(value, int | float) for value in line.values())
    assert [line["tokens_generated"] for line in trained] == sorted(line["tokens_generated"] for line in trained)


def test_evaluations_run_first_last_and_in_between(done):
    evaluations = [line for line in lines(done / "metrics.jsonl") if "eval/score" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 3]
    for line in evaluations:
        for name in ("eval/score", "eval/sums/greedy/right", "eval/sums/drawn/number"):
            assert line[f"{name}_low"] <= line[name] <= line[f"{name}_high"]
            assert line[f"{name}_n"] == 4
        assert line["eval/more/sampled/number_n"] == 3
        assert line["eval/score"] == line["eval/sums/greedy/right"]
        assert {"eval/loss", "eval/distil/forward_kl", "eval/more/loss"} <= line.keys()
    (lift,) = [line for line in lines(done / "metrics.jsonl") if "lift/sums/greedy/right" in line]
    assert lift["step"] == 0


def test_every_completion_and_its_scores_are_stored(done):
    assert sorted(p.name for p in (done / "evaluations").iterdir()) == [
        f"step_00000{step}.jsonl" for step in (0, 2, 3)
    ]
    records = lines(done / "evaluations" / "step_000003.jsonl")
    assert len(records) == 4 * (1 + 2) + 3 * 2
    keys = {"suite", "decoding", "row", "prompt", "completion", "scores", "feedback", "passed", "measures"}
    assert keys == records[0].keys()
    values = [r["scores"]["number"] for r in records if (r["suite"], r["decoding"]) == ("sums", "drawn")]
    expected = metrics(done)[-1]["eval/sums/drawn/number"]
    assert sum(values) / len(values) == pytest.approx(expected)


def test_measures_of_completions_are_reported_before_and_after(done):
    first, *_, last = [line for line in lines(done / "metrics.jsonl") if "eval/score" in line]
    assert first["eval/sums/drawn/pass_at_1"] == first["eval/sums/drawn/right"]
    assert last["eval/sums/drawn/pass_at_2_n"] == 4
    assert "eval/sums/greedy/entropy" not in last
    changes = {(c["suite"], c["decoding"], c["measure"]): c for c in json.loads((done / "measures.json").read_text())}
    change = changes["sums", "drawn", "entropy"]
    assert [change[name][0] for name in ("before", "after")] == pytest.approx(
        [line["eval/sums/drawn/entropy"] for line in (first, last)]
    )
    assert change["change"][0] == pytest.approx(change["after"][0] - change["before"][0])
    assert changes["more", "sampled", "distinct_2"]["n"] == 3


def test_best_model_is_kept_by_a_measure(done):
    entropies = {
        line["step"]: line["eval/sums/drawn/entropy"] for line in lines(done / "metrics.jsonl") if "eval/score" in line
    }
    best = min(entropies, key=entropies.__getitem__)
    note = json.loads((done / "best" / "best.json").read_text())
    assert note == {"step": best, "eval/sums/drawn/entropy": entropies[best]}


def test_teacher_lift_is_stored_prompt_by_prompt(done):
    (lift,) = [line for line in lines(done / "metrics.jsonl") if "lift/sums/drawn/number" in line]
    records = [r for r in lines(done / "lift.jsonl") if (r["suite"], r["decoding"]) == ("sums", "drawn")]
    assert [record["row"] for record in records] == [0, 0, 1, 1]
    lifts = [record["lift"]["number"] for record in records]
    assert lift["lift/sums/drawn/number"] == pytest.approx(sum(lifts) / 4)
    assert lift["lift/sums/drawn/number/hurt"] == pytest.approx(sum(value < 0 for value in lifts) / 4)
    (warning,) = [w for w in lines(done / "warnings.jsonl") if w["wire"] == "no_lift"]
    assert "lifts no score" in warning["cause"]


def test_rollouts_and_samples_are_stored(done):
    for step in range(3):
        (records,) = [lines(done / "rollouts" / f"step_{step:06d}.jsonl")]
        assert len(records) == 4
        for record in records:
            assert record["sampled_from_ids"] == record["prompt_ids"] != record["teacher_prompt_ids"]
            assert len(record["completion_ids"]) == len(record["sampler_logprobs"])
            assert record["policy_version"] == step
    written = [f"step_{step:06d}.{ending}" for step in (1, 3) for ending in ("jsonl", "md")]
    assert sorted(path.name for path in (done / "samples").iterdir()) == written
    for sample in lines(done / "samples" / "step_000001.jsonl"):
        assert "Example:" in sample["teacher_prompt"]
        assert "Example:" not in sample["prompt"]
        assert sample["prompt"].endswith("<|im_start|>assistant\n")
        assert set(sample["rewards"]) == {"right", "number"}
        assert isinstance(sample["completion"], str)


def test_tensorboard_has_the_same_metrics(done):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(done / "tensorboard")).Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    expected = {m["step"]: m["loss"] for m in metrics(done) if "loss" in m}
    assert logged == pytest.approx(expected, rel=1e-5)
    assert {event.step for event in events.Scalars("eval/score")} == {0, 2, 3}


def test_plot_and_result_are_written(done):
    assert (done / "plot.png").read_bytes()[:4] == b"\x89PNG"
    result = json.loads((done / "result.json").read_text())
    assert len(result) == 2 * 2 + 2 + 2 * 1  # two samples have pass@1 and pass@2
    assert result[0]["n"] == 4
    assert result[0]["after"][0] - result[0]["before"][0] == pytest.approx(result[0]["change"][0])


def test_saved_model_is_the_trained_one(done, tiny_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(done / "model")
    start = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(done / "model")
    assert tokenizer.chat_template
    ids = tokenizer("What is 3 + 9?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert (trained(ids).logits - start(ids).logits).abs().max() > 1e-2
    for name, value in weights_of(done).items():
        assert_equal(value, trained.get_parameter(name).detach())


def test_no_partial_file_remains(done):
    assert not [p for p in done.rglob("*") if "partial" in p.name]


def test_run_is_reproducible(done, full_spec, tmp_path):
    repeated = train(full_spec, tmp_path / "again")
    assert metrics(repeated) == metrics(done)
    for name, value in weights_of(done).items():
        assert_equal(weights_of(repeated)[name], value)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_another_seed_gives_another_run(tiny_folder, tmp_path, lora):
    runs = [
        train(
            make_spec(tiny_folder, model=model(tiny_folder, lora=lora), training=training(steps=1, seed=s)),
            tmp_path / str(i),
        )
        for i, s in enumerate((3, 3, 4))
    ]
    first, repeated, other = map(metrics, runs)
    assert first == repeated
    assert first != other


def test_run_is_not_overwritten_by_default(full_spec, tmp_path):
    spec = make_spec(full_spec.model.path, training=training(steps=1))
    folder = train(spec, tmp_path / "run")
    with pytest.raises(UnreadableInput, match="exists"):
        train(spec, folder)
    (folder / "old").touch()
    train(spec, folder, overwrite=True)
    assert not (folder / "old").exists()
    assert read_status(folder)["state"] == "done"


def test_folder_without_a_run_is_never_overwritten(full_spec, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("precious")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UnreadableInput):
            train(full_spec, folder, **options)
    assert [p.name for p in folder.iterdir()] == ["chapter.tex"]


def test_run_that_began_meanwhile_is_not_overwritten(tiny_folder, tmp_path, monkeypatch):
    """Another command begins a run in the folder while this one loads its model."""
    folder, load = tmp_path / "run", run_module.open_run

    def load_while_another_begins(*args):
        folder.mkdir()
        (folder / "resolved.yaml").write_text("another's")
        return load(*args)

    monkeypatch.setattr(run_module, "open_run", load_while_another_begins)
    with pytest.raises(UnreadableInput, match="exists"):
        train(make_spec(tiny_folder), folder)
    assert (folder / "resolved.yaml").read_text() == "another's"


def test_run_of_a_living_process_is_not_overwritten(tiny_folder, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "resolved.yaml").touch()
    owner = {"pid": os.getpid(), "process": processes.own_start()}
    (folder / "status.json").write_text(json.dumps({"state": "running", **owner}))
    with pytest.raises(UnreadableInput, match=f"is still being trained by process {os.getpid()}"):
        train(make_spec(tiny_folder), folder, overwrite=True)
    assert (folder / "resolved.yaml").exists()


def test_bad_data_leave_no_folder(tiny_folder, tmp_path):
    spec = make_spec(tiny_folder, rollout=rollout(max_prompt_tokens=3))
    with pytest.raises(BadData, match="more than 3"):
        train(spec, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def long_spec(folder, dtype="float32", stage=0, lora=None):
    return with_evaluation(
        make_spec(
            folder,
            model=model(folder, dtype, lora),
            teacher=EMA,
            training=training(steps=4, zero_stage=stage),
            optimizer=OptimizerSpec(lr=3e-3, lr_scheduler_type="linear", warmup_steps=1),
            output=OutputSpec(checkpoint_every=2, trackers=()),
        ),
        every=2,
    )


def act_after_step(monkeypatch, step, action):
    """Call `action` while the report of this step is written."""
    report = Report.step

    def report_and_act(self, finished_step, *args):
        report(self, finished_step, *args)
        if finished_step == step:
            action()

    monkeypatch.setattr(Report, "step", report_and_act)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise RuntimeError("the power went")


FORMS = [("float32", 0, None), ("bfloat16", 1, None), ("float32", 1, LORA)]


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: f"{form[0]}-{form[1]}-{form[2] and 'lora'}")
def straight(request, tiny_folder, tmp_path_factory):
    spec = long_spec(tiny_folder, *request.param)
    return spec, train(spec, tmp_path_factory.mktemp("straight") / "run")


@pytest.mark.parametrize(
    ("step", "action", "error", "state"),
    [(2, terminate, Stopped, "stopped"), (3, terminate, Stopped, "stopped"), (3, crash, RunFailed, "failed")],
    ids=["stopped after 2", "stopped after 3", "crashed after 3"],
)
def test_resumed_run_equals_the_uninterrupted_run(straight, tmp_path, monkeypatch, step, action, error, state):
    spec, uninterrupted = straight
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        act_after_step(patch, step, action)
        with pytest.raises(error) as caught:
            train(spec, folder)
    assert read_status(folder)["state"] == state
    if error is Stopped:
        assert caught.value.exit_code == 7
        assert "--resume" in caught.value.hint
    train(spec, folder, resume=True)
    assert read_status(folder)["state"] == "done"
    assert metrics(folder) == metrics(uninterrupted)
    for name, value in weights_of(uninterrupted).items():
        assert_equal(weights_of(folder)[name], value)
    assert (folder / "result.json").read_text() == (uninterrupted / "result.json").read_text()
    for name_of_folder in ("rollouts", "samples", "evaluations"):
        texts = [{p.name: p.read_text() for p in (f / name_of_folder).iterdir()} for f in (folder, uninterrupted)]
        assert texts[0] == texts[1]


def test_run_without_checkpoints_cannot_be_resumed(done, full_spec):
    with pytest.raises(UnreadableInput, match="no checkpoint to resume from"):
        train(full_spec, done, resume=True)
    assert read_status(done)["state"] == "done"


def test_stop_during_the_last_step_lets_the_run_finish(tiny_folder, tmp_path, monkeypatch):
    act_after_step(monkeypatch, 1, terminate)
    folder = train(make_spec(tiny_folder, training=training(steps=1)), tmp_path / "run")
    assert read_status(folder)["state"] == "done"


@pytest.mark.parametrize("weights", ["student", "teacher"])
@pytest.mark.parametrize("prompt", ["student", "teacher"])
def test_sampler_uses_the_chosen_weights_and_prompt(open_tiny, weights, prompt):
    trainer = open_tiny(
        teacher=teacher(FrozenWeights()),
        rollout=rollout(sampled_by=TeacherSamples(weights=weights, prompt=prompt)),
        optimizer=OptimizerSpec(lr=1e-2),
    )
    advance(trainer)
    for r in rollouts_of(trainer, 3):
        logprobs_by_sampler = {
            (w, p): logprobs(of, ids, r.completion_ids)
            for w, of in (("student", trainer.models.student), ("teacher", trainer.models.teacher.weights))
            for p, ids in (("student", r.prompt_ids), ("teacher", r.teacher_prompt_ids))
        }
        for pair, expected in logprobs_by_sampler.items():
            gap = (torch.tensor(r.sampler_logprobs) - expected).abs().max()
            assert (gap < 1e-4) == (pair == (weights, prompt))


def logprobs(weights, prompt, completion):
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad(), weights.active() as causal:
        all_logprobs = causal(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return all_logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("weights", ["student", "teacher"])
@pytest.mark.parametrize("prompt", ["student", "teacher"])
def test_complete_run_with_each_sampler(tiny_folder, tmp_path, weights, prompt):
    sampler = TeacherSamples(weights=weights, prompt=prompt)
    spec = make_spec(tiny_folder, teacher=EMA, rollout=rollout(sampled_by=sampler), training=training(steps=2))
    folder = train(spec, tmp_path / "run")
    name = "prompt_ids" if prompt == "student" else "teacher_prompt_ids"
    for record in lines(folder / "rollouts" / "step_000001.jsonl"):
        assert record["sampled_from_ids"] == record[name]
    assert read_status(folder)["state"] == "done"


def test_run_on_completions_of_the_data_set(tiny_folder, tiny_tokenizer, tmp_path):
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


def test_three_skipped_steps_in_a_row_end_a_run(tiny_folder, tmp_path):
    spec = make_spec(tiny_folder, optimizer=OptimizerSpec(lr=1e6, max_grad_norm=1e12), training=training(steps=9))
    with pytest.raises(NumericsGuard, match="3 optimizer steps in a row") as caught:
        train(spec, tmp_path / "run")
    assert caught.value.exit_code == 8
    assert read_status(tmp_path / "run")["state"] == "failed"
    assert "optimizer steps in a row" in read_status(tmp_path / "run")["reason"]
    skipped = [line["skipped_steps"] for line in metrics(tmp_path / "run")]
    assert skipped == [0, 1, 1]


def test_run_with_adapters_saves_the_adapter_and_a_merged_model(tiny_folder, tmp_path):
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


@pytest.mark.parametrize(("choice", "expected"), [("drop", 2), ("keep", 6)])
def test_suite_can_keep_its_prompts_in_training(tiny_folder, tiny_tokenizer, tmp_path, choice, expected):
    """Four of the six training rows are also held out."""
    suite = Suite(data=inline(4), score="right", same_prompts=choice)
    spec = with_evaluation(make_spec(tiny_folder), suites=Table({"sums": suite}))
    assert len(RunData(spec, tmp_path, tiny_tokenizer).train) == expected
