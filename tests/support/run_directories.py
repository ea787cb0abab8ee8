"""Run directories made by hand, with evaluations."""

import json

import yaml

from sdkit.runs.intervals import mean_interval

GREEDY = ("sums", "greedy", "right")
PANEL = {"letters": "reasoning", "legs": "reasoning"}
"""Suites that belong to the panel, each with its entry."""
SPEC = {
    "losses": {"distil": {"kind": "distillation", "coefficient": 1.0}},
    "rewards": {"right": {"kind": "exact"}, "unused": {"kind": "exact"}},
    "evaluation": {"suites": {"sums": {"score": "right", "decoding": {"greedy": {"temperature": 0.0}}}}},
    "training": {"seed": 0, "steps": 2},
    "output": {"folder": "runs"},
}


def right(*numbers, of=100):
    """Scores by prompt: 1 for the prompts with these numbers, 0 for the others."""
    return {f"prompt {i}": float(i in numbers) for i in range(of)}


def score_of(share, of=100):
    return right(*range(round(share * of)), of=of)


def write_run(folder, evaluations, *, tokens=100, seconds=10.0, spec=None, status=None, **origins):
    """Writes a run directory with these evaluations: step -> score of each prompt."""
    (folder / "evaluations").mkdir(parents=True)
    (folder / "resolved.yaml").write_text(yaml.safe_dump(spec or SPEC, sort_keys=False))
    done = {"state": "done", "step": max(evaluations, default=0)}
    (folder / "status.json").write_text(json.dumps(status or done))
    (folder / "provenance.json").write_text(json.dumps(origins))
    lines = []
    for step in range(max(evaluations, default=0) + 1):
        if step:
            spent = {"time/step": seconds, "tokens_generated": step * tokens}
            lines.append({"step": step, "loss": 1.0, **spent})
        if step in evaluations:
            lines.append({"step": step, "time/evaluation": 1000.0} | figures(evaluations[step]))
            write(folder / "evaluations" / f"step_{step:06d}.jsonl", evaluations[step])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def by_key(scores):
    return scores if isinstance(next(iter(scores)), tuple) else {GREEDY: scores}


def figures(scores):
    metrics = {}
    for key, prompts in by_key(scores).items():
        interval = mean_interval(list(prompts.values()))
        name = "eval/" + "/".join(key)
        for prefix in (name, "eval/score"):
            metrics |= {prefix: interval.mean, f"{prefix}_low": interval.low}
            metrics |= {f"{prefix}_high": interval.high, f"{prefix}_n": interval.n}
    return metrics


def write(path, scores):
    records = [
        {"suite": s, "decoding": d, "row": i, "prompt": prompt, "completion": "", "scores": {r: value}}
        | ({"panel": PANEL[s]} if s in PANEL else {})
        for (s, d, r), prompts in by_key(scores).items()
        for i, (prompt, value) in enumerate(prompts.items())
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
