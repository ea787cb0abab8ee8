"""vLLM beside the trainer, in a process of its own: prints its measurements as one JSON object.

`python vllm_scenario.py MODEL_FOLDER WORK_FOLDER`; test_vllm.py checks them.
"""

import itertools
import json
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from attrs import evolve
from tinyruns import LORA, QLORA, advance, collect, make_spec, model, rollout, teacher

from sdkit.batches import SamplingRequest
from sdkit.distributed import zero
from sdkit.language.errors import NumericsGuard
from sdkit.language.specs import EmaWeights, FileEnvironment, OptimizerSpec, VllmBackend
from sdkit.models.loading import load_model
from sdkit.models.teachers import open_teacher
from sdkit.models.weights import Weights
from sdkit.seeds import derive
from sdkit.train.run import open_run
from sdkit.train.sampling_requests import sampling_params

LIMIT = 200  # of the 404 ids


def main(folder, work):
    spec = make_spec(
        folder,
        teacher=teacher(EmaWeights(update_rate=0.3)),
        rollout=rollout(temperature=0.7, backend=VllmBackend(kv_cache_gib=0.1, enable_sleep_mode=True)),
        optimizer=OptimizerSpec(lr=1e-2),
        environment=game(work),
    )
    trainer = open_run(spec, work)
    before = generators()
    backend, first = trainer.sampler.backends.load(trainer.models.student, trainer.progress.optimizer_steps)
    results = {"generators untouched": generators() == before, "first load": first}
    results["reload has vLLM's configuration"] = watch_reload(backend)
    results |= kernels()
    results |= syncs(trainer)
    results |= sampling(trainer, backend)
    results |= continuous(trainer, backend)
    results |= sleeping(trainer, backend)
    results |= stale(trainer, backend)
    results |= adapters(trainer, backend, folder)
    results |= quantized(trainer, backend, folder)
    trainer.close()
    zero.stop()
    return results


def generators():
    state = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2]


def watch_reload(backend):
    """Returns a list that receives, at each transfer, whether vLLM's configuration is set as its worker sets it."""
    has_config = []

    def watch(worker):
        from vllm.config import get_current_vllm_config_or_none

        reload = worker.model_runner.reload_weights

        def watched(**weights):
            has_config.append(get_current_vllm_config_or_none() is not None)
            reload(**weights)

        worker.model_runner.reload_weights = watched

    backend.engine.collective_rpc(watch)
    return has_config


def kernels():
    """What the engine computes norms with, and the largest error of that, in roundings of its type."""
    from vllm import ir

    norms = {"rms_norm": ir.ops.rms_norm, "fused_add_rms_norm": ir.ops.fused_add_rms_norm}
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, weight = (torch.randn(*shape, dtype=dtype) for shape in ((40, 96), (40, 96), (96,)))
        total = x.double() + residual.double()
        for name, norm in norms.items():
            own = norm.impls[norm.get_priority()[0]]
            states, inputs = (x.double(), (x,)) if name == "rms_norm" else (total, (x, residual))
            exact = states * (states.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
            done = own.func_impl_fn(*inputs, weight, 1e-5)
            results = [(done, exact)] if name == "rms_norm" else zip(done, (exact, total), strict=True)
            errors[f"{name} {dtype}"] = max(
                ((result.double() - right).abs().max() / right.abs().max() / torch.finfo(dtype).eps).item()
                for result, right in results
            )
    return {"kernels": {name: norm.get_priority() for name, norm in norms.items()}, "kernels' errors": errors}


def syncs(trainer):
    """Figures of the weight transfer after each of three updates, of a repeated transfer, and of the teacher's."""
    figures = []
    for step in range(3):
        advance(trainer, 1)
        figures.append(collect(trainer, step).figures)
    again = collect(trainer, 3).figures
    other = trainer.sampler.backends.load(trainer.models.teacher.weights, trainer.progress.optimizer_steps)[1]
    return {"syncs": figures, "unchanged weights": again, "teacher": other}


def sleeping(trainer, backend):
    """Whether the engine sleeps, by vLLM's own state, and the figures of the transfer that wakes it."""
    executor = backend.engine.llm_engine.engine_core.engine_core.model_executor
    before = executor.is_sleeping
    trainer.sampler.backends.sleep()
    trainer.sampler.backends.sleep()  # has no effect
    asleep = executor.is_sleeping
    woken = trainer.sampler.backends.load(trainer.models.student, trainer.progress.optimizer_steps)[1]
    return {"sleeping": [before, asleep, executor.is_sleeping], "woken": woken}


def sampling(trainer, backend):
    """Sampled tokens and their log-probabilities against a plain forward pass."""
    trainer.sampler.backends.load(trainer.models.student, trainer.progress.optimizer_steps)
    ids = [trainer.setup.data.student_ids(row) for row in trainer.setup.data.train]
    requests = [SamplingRequest(prompt_ids=p, seed=derive(3, i)) for i, p in enumerate(ids * 2)]
    settings = sampling_params(trainer.setup.spec.rollout, trainer.models.ids_below)
    done = backend.sample(requests, settings)
    greedy = backend.sample(requests, evolve(settings, temperature=0.0))
    few = backend.sample(requests[4:1:-1], settings)[::-1]
    truncated = backend.sample(requests, evolve(settings, top_k=3))
    limited = backend.sample(requests, evolve(settings, temperature=2.0, ids_below=LIMIT))
    gaps, gaps_at_1, greedy_matches, top_k_gaps = [], [], [], []
    for request, drawn, best, cut in zip(requests, done, greedy, truncated, strict=True):
        token_logits = logits(trainer, request, drawn)
        gaps.append(gap((token_logits / 0.7).log_softmax(-1), drawn))
        gaps_at_1.append(gap(token_logits.log_softmax(-1), drawn))
        greedy_matches.append(logits(trainer, request, best).argmax(-1).tolist() == list(best.ids))
        scaled = logits(trainer, request, cut) / 0.7
        top = scaled.topk(3, dim=-1).values[:, -1:]
        top_k_gaps.append(gap(scaled.masked_fill(scaled < top, float("-inf")).log_softmax(-1), cut))
    logprobs_below = [
        (logits(trainer, r, c)[:, :LIMIT] / 2.0).log_softmax(-1) for r, c in zip(requests, limited, strict=True)
    ]
    return {
        "largest id": max(i for c in limited for i in c.ids),
        "limited logprobs": max(map(gap, logprobs_below, limited)),
        "sampled logprobs": max(gaps),
        "at temperature 1": max(gaps_at_1),
        "top_k logprobs": max(top_k_gaps),
        "greedy is the arg max": all(greedy_matches),
        "same seeds, same tokens": [c.ids for c in backend.sample(requests, settings)] == [c.ids for c in done],
        "another batch, same tokens": [c.ids for c in few] == [c.ids for c in done[2:5]],
        "other seeds, other tokens": done[0].ids != done[len(ids)].ids,
        "stop texts": stop_texts(trainer, backend, requests, settings, done),
    }


def stop_texts(trainer, backend, requests, settings, done):
    """Whether each completion ends at the token that completes a stop text."""
    decode = trainer.setup.data.tokenizer.decode
    prefixes = [[decode(c.ids[:n]) for n in range(1, len(c.ids) + 1)] for c in done]
    words = {decode(c.ids[n]) for c in done for n in range(2, len(c.ids))}
    stop = sorted(word for word in words if word.isascii() and word.isprintable())[:3]
    cut = backend.sample(requests, evolve(settings, stop=tuple(stop)))
    expected = []
    for completion, texts in zip(done, prefixes, strict=True):
        ends = [n for n, text in enumerate(texts, 1) if any(word in text for word in stop)]
        expected.append((completion.ids[: ends[0] if ends else None], bool(ends)))
    same = [(c.ids, c.finished) for c in cut] == expected
    return {"stopped": sum(end for _, end in expected), "of": len(cut), "same": same}


def logits(trainer, request, completion):
    return logits_of(trainer.models.student, request, completion)


def logits_of(weights, request, completion):
    ids = torch.tensor([[*request.prompt_ids, *completion.ids]])
    with torch.no_grad(), weights.active() as causal:
        return causal(ids).logits[0, len(request.prompt_ids) - 1 : -1]


def gap(logprobs, completion):
    own = logprobs.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
    return (own - torch.tensor(completion.logprobs)).abs().max().item()


GAME = """
import random, time

class Game:
    def reset(self, **columns): ...

    def reply(self, text):
        time.sleep(0.2 * (random.random() < 1 / 4))
        return f"No, {random.random()}."
"""


def game(work):
    (work / "game.py").write_text(GAME)
    return FileEnvironment(file=str(work / "game.py"), class_name="Game", max_turns=4, max_observation_tokens=16)


def continuous(trainer, backend):
    """Whether trajectories are the same at their own pace as in lockstep, and how often a turn overtook another."""
    sampler, spec = trainer.sampler, trainer.setup.spec
    rows = list(trainer.setup.data.train) * 2
    requests = [
        SamplingRequest(prompt_ids=trainer.setup.data.student_ids(row), seed=derive(4, i))
        for i, row in enumerate(rows)
    ]
    settings = evolve(sampling_params(spec.rollout, trainer.models.ids_below), stop=("e", "a"))
    environment = evolve(spec.environment, scheduling="continuous")
    own_pace = evolve(sampler, setup=evolve(trainer.setup, spec=evolve(spec, environment=environment)))
    started, start = [], backend.start
    backend.start = lambda request, sampling: started.append(request) or start(request, sampling)
    played = own_pace.complete(backend, requests, rows, settings, None)
    del backend.start
    expected = sampler.complete(backend, requests, rows, settings, None)
    turns = [len(request.prompt_ids) for request in started if request.trajectory is not None]
    gaps = [
        abs(a - b) for x, y in zip(played, expected, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True)
    ]
    return {
        "same at their own pace": [(c.ids, c.spans, c.ending) for c in played]
        == [(c.ids, c.spans, c.ending) for c in expected],
        "their logprobs": max(gaps),
        "endings": sorted({c.ending for c in played}),
        "shorter turns after longer ones": sum(a > b for a, b in itertools.pairwise(turns)),
        "turns": len(started),
        "trajectories": len(requests),
    }


def stale(trainer, backend):
    """A transfer that loses the tensors must be detected, and a complete one must repair it."""
    send = backend.engine.collective_rpc
    with torch.no_grad():
        for parameter in trainer.models.student.model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.05)
    backend.engine.collective_rpc = lambda *_, **__: [1]
    try:
        backend.load(trainer.models.student, 9)
        caught = None
    except NumericsGuard as error:
        caught = str(error)
    backend.engine.collective_rpc = send
    return {"stale": caught, "repaired": backend.load(trainer.models.student, 9)}


def adapters(trainer, backend, folder):
    """Transfers of merged copies: a model with its own adapters, and its teacher."""
    tuned, average = adapted(folder, LORA)
    before = {n: p.detach().clone() for n, p in tuned.model.named_parameters()}
    figures = [
        backend.load(weights, version)["canary_mean"]
        for version, weights in enumerate((tuned, average.weights, Weights(tuned.model, None), tuned))
    ]
    untouched = all(torch.equal(p, before[n]) for n, p in tuned.model.named_parameters())
    return {"merged": figures, "adapters untouched": untouched}


def quantized(trainer, backend, folder):
    """Transfers of merged copies of a model in 4 bits, and how far its tokens' log-probabilities are from that model's."""
    tuned, average = adapted(folder, QLORA)
    requests = [
        SamplingRequest(prompt_ids=trainer.setup.data.student_ids(row), seed=3) for row in trainer.setup.data.train
    ]
    settings = evolve(sampling_params(trainer.setup.spec.rollout, trainer.models.ids_below), temperature=1.0)
    figures, gaps = [], []
    for version, weights in enumerate((Weights(tuned.model, None), average.weights, tuned)):
        figures.append(backend.load(weights, version)["canary_mean"])
        for request, drawn in zip(requests, backend.sample(requests, settings), strict=True):
            gaps.append(gap(logits_of(weights, request, drawn).log_softmax(-1), drawn))
    return {"quantized": figures, "quantized logprobs": max(gaps)}


def adapted(folder, lora):
    """A model with adapters and its teacher, all of other values than at the start."""
    tuned = Weights(load_model(model(folder, lora=lora), str(folder), 5).to("cpu"))
    average = open_teacher(EmaWeights(update_rate=0.3), tuned, None, None)
    with torch.no_grad():
        for name, parameter in tuned.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2 if ".default." in name else 0.1)
    return tuned, average


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
