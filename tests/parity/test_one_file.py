"""sdkit against the one-file version: with the same rows and start, the same loss at every step."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
ROWS = [{"prompt": f"What is {i} + {i}?", "demonstration": f"{i} + {i} = {2 * i}"} for i in range(7)]

RUN = """
method: {method}
model: {{path: {model}, dtype: float32}}
data: {{source: {{kind: jsonl, path: {rows}}}, columns: {{prompt: prompt, demonstration: demonstration}}}}
rollout: {{max_new_tokens: 12, backend: transformers}}
teacher: {{sees: {{max_prompt_tokens: 512}}}}
optimizer: {{lr: 1.0e-3}}
training: {{steps: {steps}, prompts_per_step: 4, zero_stage: {stage}, micro_batch_tokens: 300, chunk_tokens: 5}}
output: {{trackers: []}}
"""


@pytest.fixture(scope="module")
def one_file_losses(tiny_folder, tmp_path_factory):
    """The file of rows, and the losses of the one-file version."""
    rows = tmp_path_factory.mktemp("twin") / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import one_file_sdft
    finally:
        sys.path.pop(0)
    return rows, one_file_sdft.train(tiny_folder, ROWS, STEPS)


@pytest.mark.parametrize("stage", [0, 1])
def test_sdkit_trains_like_the_one_file_version(warm, one_file_losses, tiny_folder, tmp_path, stage):
    rows, expected = one_file_losses
    spec = tmp_path / "run.yaml"
    method = ROOT / "sdkit" / "methods" / "sdft.yaml"
    spec.write_text(
        RUN.format(method=method, model=tiny_folder, rows=rows, steps=STEPS, stage=stage), encoding="utf-8"
    )
    done = warm.run("-m", "sdkit", "train", spec, "--to", tmp_path / "run", timeout=300)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "grad_norm" in line]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0], "and something is learnt"
