"""A real vLLM server on loopback as the teacher: scores and training match those with the same model in process."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from os_processes import free_port
from tinyruns import advance, distil, make_spec, rollouts_of, teacher
from vllm_build import require_vllm

from sdkit.batches import UnpaddedSequence
from sdkit.language.errors import BadEnvironment
from sdkit.language.specs import ExternalWeights, ServedWeights, TopKSupport
from sdkit.serving.teacher_client import ServedModel

require_vllm()
pytestmark = pytest.mark.timeout(900)

K = 24
START_SECONDS = 600  # seconds; 42 on a quiet machine
TOP = distil(support=TopKSupport(k=K, chosen_by="teacher", remainder="tail_bucket"))
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def served(other_folder, tmp_path_factory):
    """A teacher served by `python -m vllm.entrypoints.openai.api_server`."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    options = {
        "--model": other_folder,
        "--served-model-name": "big",
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": "float32",
        "--max-model-len": 512,
        "--max-num-seqs": 16,
        "--max-logprobs": K,
        "--kv-cache-memory-bytes": 1 << 27,
    }
    arguments = [str(part) for pair in options.items() for part in pair]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, "--enforce-eager"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | QUIET,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(url, process, log)
            yield ServedWeights(url=url, model="big", request_seconds=300.0)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(30)


def _wait(url, process, log):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"no server within {START_SECONDS} s: {log.read_text()[-3000:]}")


def test_served_scores_match_the_model_in_process(served, other_folder, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(other_folder)
    model = ServedModel(served, K, {})
    try:
        model.check(tiny_tokenizer)
        assert model.context == 512
        texts = [
            UnpaddedSequence(prompt=tuple(range(5 + i, 60)), completion=tuple(range(70, 90)), positions=(0, 3, 19))
            for i in range(5)
        ]
        scores = model.score(texts, 404)
    finally:
        model.close()
    with torch.no_grad():
        for i, text in enumerate(texts):
            ids = torch.tensor([[*text.prompt, *text.completion]])
            logprobs = causal(ids).logits[0, len(text.prompt) - 1 : -1].log_softmax(-1)
            expected = logprobs[list(text.positions)]
            actual = scores.at(slice(3 * i, 3 * i + 3))
            torch.testing.assert_close(actual.logprobs, expected.topk(K).values, atol=1e-3, rtol=0)
            torch.testing.assert_close(expected.gather(1, actual.ids), actual.logprobs, atol=1e-3, rtol=0)
            sampled = expected[range(3), [text.completion[p] for p in text.positions]]
            torch.testing.assert_close(actual.sampled, sampled, atol=1e-3, rtol=0)


def test_steps_with_a_served_teacher_match_the_model_in_process(open_tiny, tiny_folder, served, other_folder):
    runs = []
    for weights in (served, ExternalWeights(path=str(other_folder), dtype="float32")):
        trainer = open_tiny(make_spec(tiny_folder, teacher=teacher(weights), losses=TOP))
        tokens = [r.completion_ids for r in rollouts_of(trainer)]
        runs.append((tokens, [step.metrics for step in advance(trainer, 2)]))
    (served_tokens, served_metrics), (tokens, expected_metrics) = runs
    assert served_tokens == tokens
    for ours, theirs in zip(served_metrics, expected_metrics, strict=True):
        for name in ("loss", "distil/teacher_mass", "distil/k1", "distil/overlap", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-3), name


def test_more_logprobs_than_the_server_allows_are_refused(served, tiny_tokenizer):
    model = ServedModel(served, K + 1, {})
    try:
        with pytest.raises(BadEnvironment, match="greater than max allowed: 24") as caught:
            model.check(tiny_tokenizer)
    finally:
        model.close()
    assert caught.value.hint == "start it with --max-logprobs 25"
