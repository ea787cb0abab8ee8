"""The tokenizer of a run, and what its teacher sees of the held-out prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from sdkit.data.prompts import Prompter
from sdkit.data.rows import load_rows
from sdkit.language.errors import SdkitError
from sdkit.language.specs import ExperimentSpec, OfRollouts, Suite, VerifiersSource
from sdkit.language.tasksets import data_in_full
from sdkit.models.loading import load_tokenizer, resolve_model
from sdkit.report.records import RunRecord
from sdkit.train.prompt_record import template_date

PromptKey = tuple[int, str]
"""Row and text of a held-out prompt."""


def tokenizer_of(record: RunRecord) -> Any:
    """The tokenizer of the run's model, or of the trained model where the former is not at hand; None without both."""
    if record.spec is None:
        return None
    model = record.spec.model
    for find in (lambda: resolve_model(model.path, record.base), lambda: str(record.run.path / "model")):
        with contextlib.suppress(SdkitError):
            return load_tokenizer(model, find())
    return None


def teacher_prompts(record: RunRecord, tokenizer: Any) -> dict[str, dict[PromptKey, str]]:
    """The teacher's prompt of each held-out prompt, by suite, rendered again from the data.

    A suite whose data cannot be read without running code that the spec names is left out; so are all where the context
    depends on rollouts or equals the student's.
    """
    spec = record.spec
    if tokenizer is None or spec is None or spec.teacher is None or spec.teacher.sees is None:
        return {}
    if any(isinstance(slot, OfRollouts) for slot in spec.slots.values()):
        return {}
    prompts: dict[str, dict[PromptKey, str]] = {}
    with contextlib.suppress(SdkitError):
        prompter = _prompter(record, spec, tokenizer)
        readable = {n: each for n, each in spec.suites.items() if not isinstance(each.data.source, VerifiersSource)}
        for name, suite in readable.items():
            with contextlib.suppress(SdkitError):
                prompts[name] = dict(_of_suite(record, spec, suite, prompter))
    return prompts


def _prompter(record: RunRecord, spec: ExperimentSpec, tokenizer: Any) -> Prompter:
    model = spec.model
    options: Mapping[str, Any] = dict(model.chat_template_kwargs)
    now = template_date(record.provenance)
    return Prompter(tokenizer, options, now=now, keep_text=model.control_tokens == "text")


def _of_suite(
    record: RunRecord, spec: ExperimentSpec, suite: Suite, prompter: Prompter
) -> Iterator[tuple[PromptKey, str]]:
    assert spec.teacher is not None
    for row in load_rows(data_in_full(spec, suite.data), record.base):
        if prompt := prompter.teacher_ids(row, spec.teacher.sees):
            yield (row.index, row.prompt_text), prompter.tokenizer.decode(prompt.ids)
