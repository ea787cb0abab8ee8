"""Draws run files that `sdkit train` runs as they are: rows in files, rewards, evaluation, rollout servers, served teachers."""

import csv
import json
from random import Random

import generated

from sdkit.language.specs import MethodSpec, OptimizerSpec, TeacherSpec, TrainingSpec, TransformersBackend

TEACHER_TERMS = ("distillation", "policy_gradient")
QUESTIONS = 8
ROWS = [
    {
        "question": f"What is {n} + 1?",
        "demonstration": str(n + 1),
        "answer": str(n + 1),
        "source": "first",
        "topic": {"of": "sums"},
    }
    for n in range(QUESTIONS)
]
SOURCES = [
    {"kind": "jsonl", "path": "rows.jsonl"},
    {"kind": "json", "path": "rows.json"},
    {"kind": "csv", "path": "rows.csv"},
    {"kind": "parquet", "path": "rows.parquet"},
    {"kind": "saved_dataset", "path": "rows"},
    {"kind": "inline", "rows": ROWS},
]
PROMPTS = ["question", {"template": "{question}"}, {"template": "{topic.of}: {question}"}]
REWARDS = [
    {"kind": "regex", "pattern": "e"},
    {"kind": "exact"},
    {"kind": "number"},
    {"kind": "file", "file": "reward.py", "function": "graded"},
]
REWARD = '''
def graded(completion, row):
    """Returns a score and, for a low one, feedback."""
    score = len(completion) % 5 / 4
    return score if score == 1 else (score, f"not {row['answer']}")
'''


def write_inputs(folder):
    """Writes the rows in every format, and a reward, into the folder of the run files."""
    from datasets import Dataset

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows({**row, "topic": json.dumps(row["topic"])} for row in ROWS)
    rows = Dataset.from_list(ROWS)
    rows.to_parquet(folder / "rows.parquet")
    rows.save_to_disk(folder / "rows")
    (folder / "reward.py").write_text(REWARD)


def run_file(seed, model, other, teacher_url, sampler_url=None, backends=("own", "server")):
    """Returns a complete run file of two to three steps, the same one for the same seed.

    `model`, `other`: folders of models; `teacher_url` serves the second as `teacher`; `sampler_url` samples for
    `backend: vllm_server`; `backends` are the choices between transformers (`own`), that server and vLLM in the trainer's
    process (`vllm`).
    """
    drawn = generated.Drawn(Random(seed).choice, {"path": str(other), "url": teacher_url})
    page = _with_teacher_if_used(drawn, generated.connect(drawn.spec(MethodSpec)))
    small = {"max_new_tokens": drawn.one_of((1, 4, 8)), "completions_per_prompt": drawn.one_of((1, 2, 4))}
    page["rollout"] = {**page.get("rollout", {}), **small}
    for key in ("max_staleness", "max_prompt_tokens"):  # the backend's choice; prompts are longer than what is drawn
        page["rollout"].pop(key, None)
    page["rollout"] |= _backend(drawn, page, drawn.one_of(backends), sampler_url)
    suite = {"data": {"source": drawn.one_of(SOURCES), "limit": 2}, "score": "first", "loss_prompts": 1}
    return page | {
        "model": {"path": str(model), "dtype": "float32", "lora": drawn.one_of((None, {"r": 2, "lora_alpha": 4}))},
        "data": {
            "source": drawn.one_of(SOURCES),
            "columns": {
                "prompt": drawn.one_of(PROMPTS),
                **{name: name for name in ("demonstration", "answer", "source")},
            },
            "shuffle": drawn.one_of((True, False)),
        },
        "rewards": {"first": drawn.one_of(REWARDS)},
        "evaluation": {
            "suites": {"held_out": suite},
            "every": drawn.one_of((None, 1)),
            "teacher_lift": drawn.one_of((0, 1)),
        },
        "environment": drawn.one_of((None, None, None, {"kind": "retry", "max_turns": 2})),
        "optimizer": drawn.spec(OptimizerSpec) | {"lr": drawn.one_of((1e-6, 1e-4))},
        "training": drawn.spec(TrainingSpec)
        | {"steps": drawn.one_of((2, 3)), "prompts_per_step": drawn.one_of((2, 4))},
        "output": {"checkpoint_every": 1, "trackers": []},
    }


def _with_teacher_if_used(drawn, page):
    """Draws a teacher for a page with terms that need one, and removes that of others, which would not be accepted."""
    needed = any(term["kind"] in TEACHER_TERMS for term in page["losses"].values())
    if needed and "teacher" not in page:
        page["teacher"] = drawn.spec(TeacherSpec)
    elif not needed:
        page.pop("teacher", None)
    return generated.connect(page)


def _backend(drawn, page, kind, sampler_url):
    """The keys of `rollout` that name the engine; terms get the ratio that stale rollouts need."""
    if kind == "own":
        return {"backend": {"kind": "transformers"} | drawn.spec(TransformersBackend)}
    if kind == "vllm":
        return {"backend": {"kind": "vllm", "kv_cache_gib": 0.1}}
    staleness = drawn.one_of((0, 1, 2))
    for term in page["losses"].values() if staleness else ():
        if term["kind"] in TEACHER_TERMS:
            ratio = {"cap": 2.0, "level": drawn.one_of(("token", "sequence_mean"))}
            term["importance"] = {**term.get("importance", {}), "sampler": ratio}
    return {"backend": {"kind": "vllm_server", "urls": [sampler_url], "folder": "weights"}, "max_staleness": staleness}
