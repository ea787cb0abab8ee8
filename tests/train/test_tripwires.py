"""Tripwires: degenerate steps, when a warning comes, and that a run warns once."""

import pytest
from tinyruns import lines, make_spec, rollout, silent_console, teacher, train, training

from sdkit.language.errors import RunFailed
from sdkit.language.specs import ExactReward, GroupRelative, OutputSpec, PolicyGradient, StudentWeights, Table
from sdkit.train.report import Report
from sdkit.train.tripwires import TRIPWIRES, triggered

FINE = {
    "loss": 0.5,
    "loss/distil": 0.5,
    "distil/tokens": 40.0,
    "distil/forward_kl": 0.4,
    "distil/reverse_kl": 0.3,
    "grad_norm": 1.5,
    "rollout/kept": 1.0,
    "rollout/finished": 0.5,
    "rollout/with_teacher": 1.0,
    "rollout/no_advantage": 0.25,
    "teacher/success_groups": 0.5,
}
FLAT = FINE | {"rollout/no_advantage": 1.0}


def run_of(*steps):
    return [{"step": i, **figures} for i, figures in enumerate(steps, start=1)]


def wires(*steps, patience=2):
    return [trip.wire for trip in triggered(run_of(*steps), patience)]


NO_UPDATE = {"rollout/kept": 0.0, "rollout/finished": 0.5}
DEGENERATE = {
    "flat": (FLAT, "flat_rewards", "no advantage is left"),
    "filtered": (NO_UPDATE, "nothing_counted", "rollout.keep let none through"),
    "no context": (
        FINE | {"distil/tokens": 0.0, "distil/forward_kl": 0.0, "rollout/with_teacher": 0.0},
        "nothing_counted",
        "distil counted no token: no rollout had a teacher prompt",
    ),
    "masked": (FINE | {"distil/tokens": 0}, "nothing_counted", "mask and route left none"),
    "no success": (FINE | {"teacher/success_groups": 0.0}, "no_success", "successful rollout"),
    "same": (
        FINE | {"distil/forward_kl": 1e-8, "distil/reverse_kl": -1e-8, "grad_norm": 0.0},
        "no_divergence",
        "1.0e-08 nats per token",
    ),
    "cut": (FINE | {"rollout/finished": 0.0, "grad_norm": 1.0}, "all_truncated", "length limit"),
    "lost": (FINE | {"grad_norm": 0.0}, "no_gradient", "the loss is 0.5000, but its gradient is 0"),
    "silent": (FINE | {"grad_norm": 1e-9, "loss": 0.0}, "no_gradient", "there is no signal"),
}


@pytest.mark.parametrize(("figures", "wire", "cause"), DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_step_trips_only_its_wire(figures, wire, cause):
    (trip,) = triggered(run_of(figures, figures), 2)
    assert trip.wire == wire
    assert cause in trip.cause
    assert trip.look_at == TRIPWIRES[wire][1]
    assert str(trip).startswith("steps 1 to 2: ")


HARMLESS = {
    "fine": FINE,
    "sampled token": {"loss/d": 1.0, "d/tokens": 3.0, "d/k1": -0.2, "grad_norm": 1.0},
    "one way only": FINE | {"distil/forward_kl": 0.0},
    "a pull that has not moved yet": {
        "loss/anchor": 0.0,
        "anchor/tokens": 3.0,
        "anchor/k1": 0.0,
        "anchor/reference_kl": 0.0,
        "grad_norm": 1.0,
        "loss": 0.0,
    },
    "skipped": FINE | {"grad_norm": float("inf")},
    "no rewards": {"loss": 2.0, "loss/imitate": 2.0, "imitate/tokens": 9.0, "grad_norm": 0.1},
}


@pytest.mark.parametrize("figures", HARMLESS.values(), ids=HARMLESS)
def test_harmless_step_trips_no_wire(figures):
    assert wires(*[figures] * 2) == []


def test_single_sample_estimate_is_used_if_nothing_else_exists():
    assert wires(*[{"loss/d": 0.0, "d/tokens": 3.0, "d/k1": 0.0, "grad_norm": 1.0}] * 2) == ["no_divergence"]


def test_warning_comes_once_per_onset():
    steps = [FLAT, FLAT, FLAT, FLAT, FINE, FLAT, FLAT, FLAT, FLAT]
    warned = [bool(wires(*steps[:n], patience=3)) for n in range(1, len(steps) + 1)]
    assert warned == [False, False, True, False, False, False, False, True, False]
    (trip,) = triggered(run_of(*steps[:8]), 3)
    assert (trip.first, trip.step) == (6, 8)


def test_only_the_last_steps_matter():
    steps = run_of(FINE, FLAT, FINE, FLAT, FLAT)
    assert triggered(steps, 2) == triggered(steps[-3:], 2) != []


def test_one_wire_does_not_hide_another():
    cut = FINE | {"rollout/finished": 0.0}
    both = cut | {"rollout/no_advantage": 1.0}
    assert wires(cut, cut, both, both) == ["flat_rewards"]


@pytest.fixture(scope="module")
def spec_without_signal(tiny_folder):
    """The student is its own teacher with the same prompt, so no step can teach it anything."""
    return make_spec(
        tiny_folder,
        teacher=teacher(StudentWeights(), sees=None),
        training=training(steps=4),
        output=OutputSpec(trackers=(), tripwire_steps=2, checkpoint_every=1),
    )


def warnings_of(folder):
    return [w for w in lines(folder / "warnings.jsonl") if w["wire"] == "no_divergence"]


def test_run_without_signal_warns_once(spec_without_signal, tmp_path):
    console = silent_console()
    folder = train(spec_without_signal, tmp_path / "run", console)
    (warning,) = warnings_of(folder)
    assert (warning["since"], warning["step"]) == (1, 2)
    assert "no divergence" in warning["cause"]
    output = console.file.getvalue()
    assert output.count("distil finds no divergence") == 1
    assert "warning: steps 1 to 2" in output
    assert warning["look_at"].split()[0] in output


@pytest.mark.parametrize("crash_after", [2, 3])
def test_resumed_run_warns_like_an_uninterrupted_one(spec_without_signal, tmp_path, monkeypatch, crash_after):
    report = Report.step

    def report_then_crash(self, step, *args):
        report(self, step, *args)
        if step == crash_after:
            raise RuntimeError("the power went")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Report, "step", report_then_crash)
        with pytest.raises(RunFailed):
            train(spec_without_signal, folder)
    train(spec_without_signal, folder, resume=True)
    assert [(w["since"], w["step"]) for w in warnings_of(folder)] == [(1, 2)]


def test_no_warning_without_tripwire_steps(tiny_folder, tmp_path):
    spec = make_spec(
        tiny_folder, teacher=teacher(StudentWeights(), sees=None), output=OutputSpec(trackers=(), tripwire_steps=None)
    )
    assert not (train(spec, tmp_path / "run") / "warnings.jsonl").exists()


def test_constant_rewards_leave_no_advantage(tiny_folder, tmp_path):
    """A random model never answers right, so all groups are constant."""
    spec = make_spec(
        tiny_folder,
        teacher=None,
        losses=Table({"policy": PolicyGradient(advantage=GroupRelative())}),
        rewards=Table({"right": ExactReward()}),
        rollout=rollout(completions_per_prompt=2),
        training=training(steps=2),
        output=OutputSpec(trackers=(), tripwire_steps=2),
    )
    folder = train(spec, tmp_path / "run")
    trained = [line for line in lines(folder / "metrics.jsonl") if "grad_norm" in line]
    assert [line["rollout/no_advantage"] for line in trained] == [1, 1]
    assert [line["rollout/constant_groups"] for line in trained] == [1, 1]
    assert "flat_rewards" in {w["wire"] for w in lines(folder / "warnings.jsonl")}
