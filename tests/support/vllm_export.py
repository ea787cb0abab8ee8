"""vLLM on exported folders, in a process of its own: prints log-probabilities of one prompt as JSON.

`python vllm_export.py MERGED BASE ADAPTER IDS`; test_export.py checks them.
"""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest


def logprobs(folder, ids, lora=None, **options):
    """Log-probabilities of every id after the first."""
    size = {"max_model_len": 64, "max_num_seqs": 2, "kv_cache_memory_bytes": 2**26}
    engine = LLM(model=folder, dtype="float32", enforce_eager=True, **size, **options)
    settings = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    output = engine.generate([TokensPrompt(prompt_token_ids=ids)], settings, use_tqdm=False, lora_request=lora)[0]
    engine.llm_engine.engine_core.shutdown()
    scored = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
    return [entry[token].logprob for entry, token in scored]


def main(merged, base, adapter, ids):
    lora = LoRARequest("exported", 1, adapter)
    return {"merged": logprobs(merged, ids), "adapter": logprobs(base, ids, lora, enable_lora=True, max_lora_rank=8)}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4], json.loads(sys.argv[4]))))
