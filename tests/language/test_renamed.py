"""Renamed keys: the old name is an error with a hint, except in a run's resolved spec."""

import re

import pytest

from sdkit.language.load import load_spec
from sdkit.language.renamed import RENAMED

FIXED = """
losses: {imitate: {kind: cross_entropy}}
data: {source: {kind: jsonl, path: rows.jsonl, origin: elsewhere}, columns: {prompt: q, demonstration: a}}
training: {steps: 1, prompts_per_step: 1}
"""
OLD = """
model:
  path: org/name
  attention: eager
  chat_template_options: {enable_thinking: false}
  lora: {rank: 4, alpha: 8, targets: [q_proj]}
  shape: {parameters: 9, hidden: 8, layers: 2, vocabulary: 7, context: 999}
optimizer: {lr: 1.0, clip: 0.5, schedule: cosine}
output: {tensorboard: false}
rewards: {judge: {kind: reward_model, path: judge, batch_rows: 3}}
"""
SAMPLED = "rollout: {sampled_by: {kind: dataset, column: demonstration}, max_new_tokens: 9, backend: {%s}}\n"
BACKENDS = {
    "vllm": SAMPLED % "kind: vllm, max_rows: 5, gpu_share: 0.3, cache_gib: 2.0",
    "vllm_server": SAMPLED % "kind: vllm_server, max_rows: 5, gpu_share: 0.3, cache_gib: 2.0",
    "transformers": SAMPLED % "kind: transformers, batch_rows: 6",
}
PLACES = {old.replace("*", "judge") for old in RENAMED if "=" not in old}


@pytest.fixture
def write_run_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def with_new_names(text):
    for old, (new, _) in RENAMED.items():
        text = re.sub(rf"\b{re.split('[.=]', old)[-1]}\b", new, text)
    return text.replace("trackers: false", "trackers: []")


def test_old_key_is_an_error_that_names_the_new_one(write_run_file):
    seen = set()
    for backend in BACKENDS.values():
        path = write_run_file(FIXED + OLD + backend)
        lines = path.read_text().splitlines()
        for problem in load_spec(path).problems:
            *above, old = problem.path
            new, origin = RENAMED[".".join(["rewards", "*", old] if above[0] == "rewards" else [*above, old])]
            assert problem.code == "unknown_key"
            assert problem.hint == f'renamed to "{new}"' + (f", as in {origin}" if origin else "")
            assert lines[problem.place.line - 1][problem.place.column - 1 :].startswith(f"{old}:")
            seen.add(".".join(problem.path))
    assert seen == PLACES


def test_old_value_is_an_error_that_names_the_new_one(write_run_file):
    text = (
        FIXED
        + "model: {path: org/name, lora: {r: 1, lora_alpha: 1, target_modules: all_linear}}\noptimizer: {lr: 1.0}\n"
    )
    (problem,) = load_spec(write_run_file(text)).problems
    assert (problem.code, problem.hint) == ("type", 'renamed to "all-linear", as in PEFT')


def test_override_with_an_old_key_gets_the_hint(write_run_file):
    text = FIXED + "model: {path: org/name}\noptimizer: {lr: 1.0}\n"
    (problem,) = load_spec(write_run_file(text), ["optimizer.clip=0.5"]).problems
    assert (str(problem.place), problem.code) == ("<command line>:1:1", "unknown_key")
    assert problem.hint == 'renamed to "max_grad_norm", as in transformers'


@pytest.mark.parametrize("backend", BACKENDS)
def test_resolved_spec_of_a_run_may_use_the_old_names(write_run_file, tmp_path, backend):
    text = (FIXED + OLD + BACKENDS[backend]).replace("[q_proj]", '"all_linear"')
    recorded = load_spec(write_run_file(text), base=tmp_path)
    assert recorded.spec is not None
    assert recorded.spec == load_spec(write_run_file(with_new_names(text))).spec
