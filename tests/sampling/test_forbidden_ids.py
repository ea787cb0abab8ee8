"""Ids that must not be sampled, as vLLM is asked to leave them out.  test_vllm.py samples with them."""

import importlib.util
import re
from pathlib import Path

import pytest

from sdkit.batches import SamplingParams
from sdkit.language.errors import BadData
from sdkit.sampling import vllm_settings as vllm

QWEN_ROWS, QWEN_IDS = 152_064, 151_665


def settings(ids_below, rows):
    params = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=8, ids_below=ids_below)
    return vllm.sampling_settings(params, [1], rows)


def test_only_the_rows_beyond_the_tokenizer_are_listed():
    asked = settings(QWEN_IDS, QWEN_ROWS)
    assert "allowed_token_ids" not in asked  # 151,665 of them
    assert list(asked["logit_bias"]) == list(range(QWEN_IDS, QWEN_ROWS))
    assert set(asked["logit_bias"].values()) == {vllm.FORBIDDING_BIAS}
    assert "logit_bias" not in settings(None, QWEN_ROWS)


def test_more_rows_than_vllm_can_leave_out_are_refused():
    assert len(settings(100, 100 + vllm.MOST_BIASED_IDS)["logit_bias"]) == vllm.MOST_BIASED_IDS
    with pytest.raises(BadData, match="1025 output rows") as caught:
        settings(100, 101 + vllm.MOST_BIASED_IDS)
    assert caught.value.path == ("rollout", "backend")


def test_the_limit_is_that_of_vllms_gpu_runner():
    installed = importlib.util.find_spec("vllm")
    if installed is None:
        pytest.skip("vLLM is not installed")
    source = Path(installed.submodule_search_locations[0]) / "v1/worker/gpu/sample/logit_bias.py"
    limit = re.search(r"^MAX_NUM_LOGIT_BIAS_TOKENS = (\d+)$", source.read_text(encoding="utf-8"), re.MULTILINE)
    assert int(limit[1]) == vllm.MOST_BIASED_IDS
