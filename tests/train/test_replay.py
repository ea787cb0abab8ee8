"""Replay: recorded rollouts, trained on again, are the run; with another loss or teacher the tokens stay."""

import json
import shutil

import pytest
from attrs import evolve
from tinyruns import (
    distil,
    evaluated,
    inline,
    lines,
    make_spec,
    metrics,
    rollout,
    same,
    teacher,
    train,
    training,
    weights_of,
)

from sdkit.language.errors import BadData, UnreadableInput
from sdkit.language.specs import EmaWeights, FrozenWeights, OptimizerSpec, OutputSpec, ReverseKl
from sdkit.train.replay import open_recording

TRAINING = training(steps=4, prompts_per_step=3)


@pytest.fixture(scope="module")
def spec(tiny_folder):
    """Four steps under a moving teacher and a moving learning rate; the checkpoint of step 3 stays."""
    return evaluated(
        make_spec(
            tiny_folder,
            teacher=teacher(EmaWeights(update_rate=0.3)),
            rollout=rollout(completions_per_prompt=2),
            training=TRAINING,
            optimizer=OptimizerSpec(lr=3e-3, lr_scheduler_type="linear", warmup_steps=1),
            output=OutputSpec(checkpoint_every=3, tensorboard=False),
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
    """Of each rollout batch from `start` on, what was sampled from which prompt."""
    return [
        [(r["sampled_from_ids"], r["completion_ids"], r["sampler_logprobs"]) for r in lines(path)]
        for path in sorted((folder / "rollouts").iterdir())[start:]
    ]


def test_a_replay_of_the_whole_run_is_the_run(spec, run, tmp_path):
    again = replay(spec, run, 0, tmp_path / "again")
    assert metrics(again) == metrics(run)
    for name, value in weights_of(run).items():
        same(weights_of(again)[name], value)
    for path in (run / "rollouts").iterdir():
        assert path.read_text() == (again / "rollouts" / path.name).read_text()
    told = json.loads((again / "provenance.json").read_text())["replayed"]
    assert told == {"run": str(run), "start": 0, "end": 4}


def test_a_replay_from_a_checkpoint_ends_as_the_run(spec, run, tmp_path):
    again = replay(spec, run, 3, tmp_path / "again")
    assert metrics(again) == metrics(run)
    assert [p.name for p in (again / "rollouts").iterdir()] == ["step_000003.jsonl"]
    for name, value in weights_of(run).items():
        same(weights_of(again)[name], value)
    assert (again / "result.json").read_text() == (run / "result.json").read_text()


def test_another_loss_and_teacher_learn_from_the_same_tokens(spec, run, tmp_path):
    changes = {"losses": distil(divergence=ReverseKl()), "teacher": teacher(FrozenWeights())}
    other = replay(evolve(spec, **changes), run, 0, tmp_path / "other", steps=2)
    assert tokens(other) == tokens(run)[:2]
    before, after = ([m for m in metrics(f) if "grad_norm" in m] for f in (run, other))
    assert [m["step"] for m in after] == [1, 2]
    assert after[0]["lr"] == before[0]["lr"]  # of four steps, though two are made
    assert after[1]["lr"] == before[1]["lr"]
    assert all("distil/reverse_kl" in m for m in after)
    assert after[0]["grad_norm"] != before[0]["grad_norm"]
    assert metrics(other)[-1]["step"] == 2
    assert "eval/score" in metrics(other)[-1]
    same_state = json.loads((other / "status.json").read_text())
    assert (same_state["state"], same_state["step"]) == ("done", 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": rollout(completions_per_prompt=2, temperature=0.5)}, "rollout.temperature"),
        ({"training": training(steps=4, prompts_per_step=2)}, "training.prompts_per_step"),
        ({"training": training(steps=5, prompts_per_step=3)}, "--steps ends a replay early"),
        ({"training": evolve(TRAINING, seed=1)}, "prompts and seeds follow from it"),
        ({"data": inline(5)}, "data.source.rows"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_would_change_a_token_is_refused(spec, run, tmp_path, changes, said):
    with pytest.raises(UnreadableInput, match=r"a replay of .* cannot change") as caught:
        open_recording(f"{run}@0").check_spec(evolve(spec, **changes), tmp_path)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": OptimizerSpec(lr=1e-3, weight_decay=0.1)}, "optimizer.weight_decay"),
        ({"training": evolve(TRAINING, zero_stage=1)}, "training.zero_stage"),
    ],
)
def test_what_a_checkpoint_holds_can_change_from_the_start_alone(spec, run, tmp_path, changes, said):
    other = evolve(spec, **changes)
    open_recording(f"{run}@0").check_spec(other, tmp_path)
    with pytest.raises(UnreadableInput, match=f"{said}: .*replay from @0"):
        open_recording(f"{run}@3").check_spec(other, tmp_path)


def test_a_checkpoint_has_the_recorded_runs_teacher_alone(spec, run, tmp_path):
    recording = open_recording(f"{run}@3")
    frozen = evolve(spec, teacher=teacher(FrozenWeights()))
    faster = evolve(spec, teacher=teacher(EmaWeights(update_rate=0.5)))
    for fine in (frozen, faster):
        recording.check_spec(fine, tmp_path)
    moving = evolve(recording, settings={**recording.settings, ("teacher", "weights", "kind"): "x"})
    with pytest.raises(UnreadableInput, match="no such teacher"):
        moving.check_spec(spec, tmp_path)


@pytest.mark.parametrize(
    ("named", "steps", "said", "hint"),
    [
        ("{run}", None, "not of the form RUN@STEP", "@0 replays the whole run"),
        ("{run}@two", None, "not of the form RUN@STEP", ""),
        ("{run}@2", None, "no checkpoint of step 2", "@0, @3"),
        ("{run}@0", 5, "recorded 4 steps from step 0 on, not 5", ""),
        ("{run}/rollouts@0", None, "is not a run directory", ""),
    ],
)
def test_what_is_no_recording(run, named, steps, said, hint):
    with pytest.raises(UnreadableInput, match=said) as caught:
        open_recording(named.format(run=run), steps)
    assert hint in (caught.value.hint or "")


def test_an_incomplete_recording_is_told(run, tmp_path):
    torn = shutil.copytree(run, tmp_path / "torn")
    (torn / "rollouts" / "step_000001.jsonl").unlink()
    cut = torn / "rollouts" / "step_000002.jsonl"
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(UnreadableInput, match="incomplete") as caught:
        open_recording(f"{torn}@0")
    assert "step_000001.jsonl is missing\nstep_000002.jsonl holds 5 of 6 rollouts" in str(caught.value)
    assert open_recording(f"{torn}@3").end == 4


@pytest.mark.parametrize(
    ("spoil", "said"), [("teacher.safetensors", "is damaged"), ("MANIFEST.json", "is not complete")]
)
def test_a_spoilt_checkpoint_is_not_replayed_from(spec, run, tmp_path, spoil, said):
    torn = shutil.copytree(run, tmp_path / "torn")
    (torn / "checkpoints/step_000003" / spoil).unlink()
    with pytest.raises(UnreadableInput, match=f"step_000003 {said}"):
        replay(spec, torn, 3, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_other_rows_are_an_error(spec, run, tmp_path):
    """A suite that holds a training row out."""
    suites = spec.evaluation.suites
    held = evolve(suites["more"], data=inline(1))
    other = evolve(spec, evaluation=evolve(spec.evaluation, suites=type(suites)({"more": held})))
    with pytest.raises(BadData, match=r"not those that .* was recorded with"):
        replay(other, run, 0, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_recording_is_never_written_over(spec, run):
    with pytest.raises(UnreadableInput, match="is the recording itself"):
        replay(spec, run, 0, run, overwrite=True)
    assert (run / "rollouts").is_dir()
