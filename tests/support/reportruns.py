"""Run directories for tests of reports, made from one small run."""

import json
import shutil

from run_directories import GREEDY, score_of, write_run
from tinyruns import lines, make_spec, train, training, with_evaluation

from sdkit.runs.run_sets import Member, RunSet, write_set

HOSTILE = "</script><script>window.stolen = 1</script><img src=x onerror='window.stolen = 2'><!--\x00\u202e &amp; {{ 7 * 7 }}"


def train_small_run(tiny_folder, folder):
    """Two steps, two suites, a teacher's lift and an evaluation after each step."""
    spec = with_evaluation(make_spec(tiny_folder, training=training(steps=2)), every=1)
    return train(spec, folder)


def make_hostile(run, folder):
    """A copy of a run in which completions, feedback, warnings and the run's own text try to become code."""
    shutil.copytree(run, folder)
    for path in (folder / "evaluations").glob("step_*.jsonl"):
        changed = [r | {"completion": HOSTILE, "feedback": {"right": HOSTILE}} for r in lines(path)]
        path.write_text("".join(json.dumps(r) + "\n" for r in changed))
    (folder / "spec.yaml").write_text(f"# {HOSTILE}\n", encoding="utf-8")
    warning = {"step": 1, "wire": "x", "cause": HOSTILE, "look_at": HOSTILE}
    (folder / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    return folder


def trajectory_run(folder):
    """A run made by hand, whose ten held-out trajectories have two turns, with its endings and success given failure."""
    ends = {}
    for step, shares in {0: (0.0, 0.2), 2: (0.5, 0.6)}.items():
        ends[step] = {("sums", "greedy", f"within_{k}"): score_of(share, of=10) for k, share in enumerate(shares, 1)}
        ends[step] = {GREEDY: score_of(shares[-1], of=10)} | ends[step]
    write_run(folder, ends)
    endings = {"trajectory/ending_done": 0.25, "trajectory/ending_max_turns": 0.75, "trajectory/ending_length": 0.0}
    written = [
        line | (endings if "loss" in line else {"eval/sums/greedy/given_failure_2": 0.2})
        for line in lines(folder / "metrics.jsonl")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    return folder


def copy_run(run, folder):
    """A copy of a run without its model."""
    return shutil.copytree(run, folder, ignore=shutil.ignore_patterns("model"))


def damage(run, folder, file, content):
    """A copy of a run with this content in one of its files."""
    copy_run(run, folder)
    (folder / file).write_text(content)
    return folder


def change_setting(run, section, key, value):
    """Change a setting in the resolved spec of a run, which the small runs store as JSON."""
    spec = json.loads((run / "resolved.yaml").read_text())
    spec[section][key] = value
    (run / "resolved.yaml").write_text(json.dumps(spec))


def make_set(folder, kind, members, **facts):
    """The manifest of a set of runs: member name → its overrides; `facts` are the kind's own."""
    listed = tuple(Member(name=n, spec="run.yaml", overrides=tuple(o), settings={}) for n, o in members.items())
    write_set(RunSet(path=folder, kind=kind, members=listed, facts=facts))


def make_seeds(run, folder, begun, waiting=0):
    """A set of seeds with `begun` copies of a run, and members that have not begun."""
    make_set(folder, "seeds", {f"seed_{i}": [f"training.seed={i}"] for i in range(begun + waiting)})
    for i in range(begun):
        copy_run(run, folder / f"seed_{i}")
        change_setting(folder / f"seed_{i}", "training", "seed", i)
    return folder


def make_sequence(run, folder):
    """A sequence of two stages, both of them copies of a run; the suite `sums` is the first one's task.

    The second starts from the model of the first.
    """
    make_set(folder, "sequence", {"first": [], "second": []}, suites={"sums": "first", "more": None})
    for stage in ("first", "second"):
        copy_run(run, folder / stage)
    change_setting(folder / "second", "model", "path", str(folder / "first" / "model"))
    return folder


def make_long(run, steps, rollouts, tokens):
    """Give a run this many steps: metrics, and rollouts with as many tokens as a reasoning model writes."""
    evaluated = [line for line in lines(run / "metrics.jsonl") if "eval/score" in line]
    trained = next(line for line in lines(run / "metrics.jsonl") if "loss" in line)
    written = evaluated + [
        trained | {"step": i, "tokens_generated": i * rollouts * tokens} for i in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    record = lines(run / "rollouts/step_000000.jsonl")[0]
    ids = [65 + i * 7 % 58 for i in range(tokens)]
    long = record | {"completion_ids": ids, "token_divergence": [0.1234 + i / tokens for i in range(tokens)]}
    text = (json.dumps(long) + "\n") * rollouts
    for step in range(steps):
        (run / f"rollouts/step_{step:06d}.jsonl").write_text(text)
