"""Replay: training again on recorded rollouts gives the same run; another loss or teacher sees the same tokens."""

import json
import shutil

import pytest
from attrs import evolve
from tinyruns import (
    QLORA,
    assert_equal,
    distil,
    inline,
    lines,
    make_spec,
    metrics,
    model,
    rollout,
    silent_console,
    teacher,
    train,
    training,
    weights_of,
    with_evaluation,
)

from sdkit.language.errors import BadData, UnreadableInput
from sdkit.language.specs import EmaWeights, FrozenWeights, OptimizerSpec, OutputSpec, ReverseKl
from sdkit.train.replay import open_recording

TRAINING = training(steps=4, prompts_per_step=3)


@pytest.fixture(scope="module")
def spec(tiny_folder):
    """Four steps with a changing teacher and learning rate; the checkpoint of step 3 is kept."""
    return with_evaluation(
        make_spec(
            tiny_folder,
            teacher=teacher(EmaWeights(update_rate=0.3)),
            rollout=rollout(completions_per_prompt=2),
            training=TRAINING,
            optimizer=OptimizerSpec(lr=3e-3, lr_scheduler_type="linear", warmup_steps=1),
            output=OutputSpec(checkpoint_every=3, trackers=()),
        ),
        every=2,
        teacher_lift=0,
    )


@pytest.fixture(scope="module")
def run(spec, tmp_path_factory):
    return train(spec, tmp_path_factory.mktemp("runs") / "run")


def replay(spec, run, start, folder, steps=None, **options):
    return train(spec, folder, recording=open_recording(f"{run}@{start}", steps), **options)


def tokens(folder, start=0):
    """Prompt ids, completion ids and log-probabilities of each rollout batch from `start` on."""
    return [
        [(r["sampled_from_ids"], r["completion_ids"], r["sampler_logprobs"]) for r in lines(path)]
        for path in sorted((folder / "rollouts").iterdir())[start:]
    ]


def test_full_replay_equals_the_run(spec, run, tmp_path):
    replayed = replay(spec, run, 0, tmp_path / "again")
    assert metrics(replayed) == metrics(run)
    for name, value in weights_of(run).items():
        assert_equal(weights_of(replayed)[name], value)
    for path in (run / "rollouts").iterdir():
        assert path.read_text() == (replayed / "rollouts" / path.name).read_text()
    record = json.loads((replayed / "provenance.json").read_text())["replayed"]
    assert record == {"run": str(run), "start": 0, "end": 4}


def test_replay_over_4_bit_weights_equals_the_run(spec, tiny_folder, tmp_path):
    quantized = evolve(spec, model=model(tiny_folder, lora=QLORA), training=evolve(TRAINING, zero_stage=2))
    run = train(quantized, tmp_path / "run")
    replayed = replay(quantized, run, 0, tmp_path / "again")
    assert metrics(replayed) == metrics(run)
    for name, value in weights_of(run).items():
        assert_equal(weights_of(replayed)[name], value)


def test_replay_from_a_checkpoint_ends_like_the_run(spec, run, tmp_path):
    replayed = replay(spec, run, 3, tmp_path / "again")
    assert metrics(replayed) == metrics(run)
    assert [p.name for p in (replayed / "rollouts").iterdir()] == ["step_000003.jsonl"]
    for name, value in weights_of(run).items():
        assert_equal(weights_of(replayed)[name], value)
    assert (replayed / "result.json").read_text() == (run / "result.json").read_text()


def test_other_loss_and_teacher_train_on_the_same_tokens(spec, run, tmp_path):
    changes = {"losses": distil(divergence=ReverseKl()), "teacher": teacher(FrozenWeights())}
    console = silent_console()
    other = replay(evolve(spec, **changes), run, 0, tmp_path / "other", steps=2, console=console)
    assert "2 of 4 steps × 3 prompts" in console.file.getvalue()
    assert tokens(other) == tokens(run)[:2]
    before, after = ([m for m in metrics(f) if "grad_norm" in m] for f in (run, other))
    assert [m["step"] for m in after] == [1, 2]
    assert after[0]["lr"] == before[0]["lr"]  # the schedule of four steps, although only two run
    assert after[1]["lr"] == before[1]["lr"]
    assert all("distil/reverse_kl" in m for m in after)
    assert after[0]["grad_norm"] != before[0]["grad_norm"]
    assert metrics(other)[-1]["step"] == 2
    assert "eval/score" in metrics(other)[-1]
    status = json.loads((other / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": rollout(completions_per_prompt=2, temperature=0.5)}, "rollout.temperature"),
        ({"training": training(steps=4, prompts_per_step=2)}, "training.prompts_per_step"),
        ({"training": training(steps=5, prompts_per_step=3)}, "--steps ends a replay early"),
        ({"training": evolve(TRAINING, seed=1)}, "prompts and seeds follow from it"),
        ({"data": inline(5)}, "data.source.rows"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_change_that_affects_tokens_is_refused(spec, run, tmp_path, changes, message):
    with pytest.raises(UnreadableInput, match=r"a replay of .* cannot change") as caught:
        open_recording(f"{run}@0").check_spec(evolve(spec, **changes), tmp_path)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optimizer": OptimizerSpec(lr=1e-3, weight_decay=0.1)}, "optimizer.weight_decay"),
        ({"training": evolve(TRAINING, zero_stage=1)}, "training.zero_stage"),
    ],
)
def test_checkpointed_settings_can_change_only_from_the_start(spec, run, tmp_path, changes, key):
    other = evolve(spec, **changes)
    open_recording(f"{run}@0").check_spec(other, tmp_path)
    with pytest.raises(UnreadableInput, match=f"{key}: .*replay from @0"):
        open_recording(f"{run}@3").check_spec(other, tmp_path)


def test_checkpoint_needs_the_recorded_teacher(spec, run, tmp_path):
    recording = open_recording(f"{run}@3")
    frozen = evolve(spec, teacher=teacher(FrozenWeights()))
    faster = evolve(spec, teacher=teacher(EmaWeights(update_rate=0.5)))
    for allowed in (frozen, faster):
        recording.check_spec(allowed, tmp_path)
    other_recording = evolve(recording, settings={**recording.settings, ("teacher", "weights", "kind"): "x"})
    with pytest.raises(UnreadableInput, match="no such teacher"):
        other_recording.check_spec(spec, tmp_path)


@pytest.mark.parametrize(
    ("argument", "steps", "message", "hint"),
    [
        ("{run}", None, "not of the form RUN@STEP", "@0 replays the whole run"),
        ("{run}@two", None, "not of the form RUN@STEP", ""),
        ("{run}@2", None, "no checkpoint of step 2", "@0, @3"),
        ("{run}@0", 5, "recorded 4 steps from step 0 on, not 5", ""),
        ("{run}/rollouts@0", None, "is not a run directory", ""),
    ],
)
def test_invalid_recording_is_refused(run, argument, steps, message, hint):
    with pytest.raises(UnreadableInput, match=message) as caught:
        open_recording(argument.format(run=run), steps)
    assert hint in (caught.value.hint or "")


def test_incomplete_recording_is_reported(run, tmp_path):
    incomplete = shutil.copytree(run, tmp_path / "torn")
    (incomplete / "rollouts" / "step_000001.jsonl").unlink()
    shortened = incomplete / "rollouts" / "step_000002.jsonl"
    shortened.write_text("".join(shortened.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(UnreadableInput, match="incomplete") as caught:
        open_recording(f"{incomplete}@0")
    assert "step_000001.jsonl is missing\nstep_000002.jsonl holds 5 of 6 rollouts" in str(caught.value)
    assert open_recording(f"{incomplete}@3").end == 4


@pytest.mark.parametrize(
    ("file_name", "message"), [("teacher.safetensors", "is damaged"), ("MANIFEST.json", "is not complete")]
)
def test_damaged_checkpoint_is_not_replayed(spec, run, tmp_path, file_name, message):
    damaged = shutil.copytree(run, tmp_path / "torn")
    (damaged / "checkpoints/step_000003" / file_name).unlink()
    with pytest.raises(UnreadableInput, match=f"step_000003 {message}"):
        replay(spec, damaged, 3, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_other_rows_are_refused(spec, run, tmp_path):
    """A suite that holds out a training row."""
    suites = spec.evaluation.suites
    overlapping = evolve(suites["more"], data=inline(1))
    other = evolve(spec, evaluation=evolve(spec.evaluation, suites=type(suites)({"more": overlapping})))
    with pytest.raises(BadData, match=r"not those that .* was recorded with"):
        replay(other, run, 0, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_recording_is_never_overwritten(spec, run):
    with pytest.raises(UnreadableInput, match="is the recording itself"):
        replay(spec, run, 0, run, overwrite=True)
    assert (run / "rollouts").is_dir()
