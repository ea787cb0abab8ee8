"""Runs tasks of EleutherAI's lm-eval on weights in this process, with transformers.  Imports lm-eval only then."""

from __future__ import annotations

import contextlib
import io
import logging
import numbers
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from attrs import asdict

from sdkit.checkpoints import rng
from sdkit.distributed import collectives
from sdkit.language.errors import BadData, BadEnvironment, SdkitError, first_line, listed
from sdkit.language.files import needs_package, sha256_of
from sdkit.language.specs import LmEvalTasks
from sdkit.models.weights import Weights
from sdkit.runs.evaluations import EvaluationResult, read_back
from sdkit.runs.score_cache import Facts
from sdkit.stdout import quiet

DECODING = "lm_eval"
"""What stands in the place of a decoding's name: the task itself says how it samples."""
SEED = 1234
"""Seed of lm-eval's few-shot examples and of everything else that it draws; its own default, except for Python's generator."""
OWN_FILES = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".txt", ".py")


def task_facts(entry: LmEvalTasks, folder: Path | None) -> Facts | None:
    """What the scores depend on; None with tasks that may read the hub, whose data sets can change."""
    if folder is None:
        return None
    files = sorted(path for path in folder.rglob("*") if path.suffix in OWN_FILES and path.is_file())
    hashes = {str(path.relative_to(folder)): sha256_of(path) for path in files}
    return {"lm_eval": {**asdict(entry), "folder": None}, "files": hashes, "seed": SEED}


def evaluate_tasks(entry: LmEvalTasks, folder: Path | None, weights: Weights, tokenizer: Any) -> EvaluationResult:
    """Score the documents of an entry's tasks; every rank runs all of them, and gets the first rank's scores.

    Raises BadEnvironment without lm-eval or without a data set, BadData for a task that does not exist, or that has no
    score for each document.
    """
    with needs_package("panel entries of kind lm_eval", "lm-eval"):
        import lm_eval  # noqa: F401  # pyright: ignore[reportMissingImports]
    random_state = rng.state()
    try:
        samples = _run(entry, folder, weights, tokenizer)
    finally:
        rng.restore(random_state)
    documents = collectives.broadcast_object(samples) or {}
    records = [record for task, docs in documents.items() for record in _records(entry.name, task, docs)]
    return read_back(records)


def _run(entry: LmEvalTasks, folder: Path | None, weights: Weights, tokenizer: Any) -> dict[str, Any] | None:
    """lm-eval's documents by task, with the metrics of which more is better; None on ranks that report nothing."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        # Task files name their data relative to the working directory.
        with contextlib.chdir(folder or "."), weights.active() as model, quiet(), _without_bars():
            language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=entry.batch_size)
            results = weights.sharding.run_forward(
                lambda: simple_evaluate(
                    model=language_model,
                    tasks=list(entry.tasks),
                    task_manager=_task_manager(entry.tasks, folder),
                    num_fewshot=entry.num_fewshot,
                    limit=entry.limit,
                    apply_chat_template=entry.chat_template,
                    bootstrap_iters=0,
                    random_seed=SEED,
                    numpy_random_seed=SEED,
                    torch_random_seed=SEED,
                    fewshot_random_seed=SEED,
                )
            )
    except (SdkitError, MemoryError):
        raise
    except (ConnectionError, ImportError) as error:
        message = f"lm-eval cannot run {listed(entry.tasks)}: {first_line(error)}"
        raise BadEnvironment(
            message, hint="fill the hub's cache where there is a network, or use local files"
        ) from error
    except Exception as error:  # lm-eval raises anything for unknown tasks and damaged files
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise BadData(f"lm-eval cannot run {listed(entry.tasks)}: {first_line(error)}") from error
    return results and {
        task: [_with_better_metrics(document, results["higher_is_better"].get(task, {})) for document in documents]
        for task, documents in results["samples"].items()
    }


@cache
def _task_manager(tasks: tuple[str, ...], folder: Path | None) -> Any:
    """lm-eval's index of task files: of the folder's alone if it has all the tasks, since reading its own takes long."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if folder:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=folder)


def _without_bars() -> contextlib.AbstractContextManager[object]:
    """Inside the block, discard the progress bars of lm-eval and its data sets, which go to stderr."""
    if os.environ.get("SDKIT_DEBUG"):
        return contextlib.nullcontext()
    return contextlib.redirect_stderr(io.StringIO())


def _with_better_metrics(document: Mapping[str, Any], higher_is_better: Mapping[str, bool]) -> dict[str, Any]:
    """A document without the metrics of which less is better, such as a perplexity."""
    return {**document, "metrics": [name for name in document["metrics"] if higher_is_better.get(name, True)]}


def _records(entry: str, task: str, documents: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A record for each document, as of any evaluation.  Raises BadData if a document has no score."""
    by_document: dict[int, list[Mapping[str, Any]]] = {}
    for document in documents:
        by_document.setdefault(document["doc_id"], []).append(document)
    for number, answers in by_document.items():
        scores = {
            _score_name(metric, answer["filter"]): float(answer[metric])
            for answer in answers
            for metric in answer["metrics"]
            if isinstance(answer[metric], numbers.Real)
        }
        if not scores:
            names = listed(dict.fromkeys(name for answer in answers for name in answer["metrics"]))
            raise BadData(f"lm-eval's task {task} has no score for each document, only {names}")
        yield {
            "suite": plain(task),
            "decoding": DECODING,
            "row": number,
            "prompt": str(answers[0]["arguments"][0][0]),
            "completion": str(answers[0]["filtered_resps"][0]),
            "scores": scores,
            "feedback": {},
            "panel": entry,
        }


def _score_name(metric: str, filter_name: str) -> str:
    return plain(metric if filter_name in ("none", "") else f"{metric}_{filter_name}")


def plain(name: str) -> str:
    """Returns a name that can stand in the name of a metric."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)
