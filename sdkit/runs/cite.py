"""`sdkit cite`: a run as a paper describes it: a methods paragraph, a table of settings, and BibTeX.

Everything comes from the run directory: the resolved spec, the method page, provenance.json and metrics.jsonl.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import evolve, frozen

from sdkit.language.bundled import PREFIX
from sdkit.language.errors import counted, listed
from sdkit.language.method_pages import first_comment
from sdkit.language.overlay import is_page_name, packaged_methods, packaged_page
from sdkit.language.specs import (
    DatasetSamples,
    DataSpec,
    DiskSource,
    ExperimentSpec,
    HubSource,
    InlineSource,
    LocalFile,
    ReasoningGymSource,
    VerifiersSource,
)
from sdkit.language.tasksets import data_in_full
from sdkit.plan.plan import plan_method
from sdkit.runs import latex
from sdkit.runs.bibliography import Paper, papers_in, software_bibtex
from sdkit.runs.directory import provenance, read_lines, read_status
from sdkit.runs.history import device_hours
from sdkit.runs.model_card import method_page

Format = Literal["markdown", "latex", "bibtex"]


@frozen(kw_only=True)
class CitedRun:
    """What a paper says of a run, or of the runs of one spec with several seeds."""

    spec: ExperimentSpec
    papers: Sequence[Paper]  # that the method page cites, the method's own first
    steps: int  # done
    facts: Mapping[str, Any]  # provenance.json
    hours: float  # of steps and evaluations, over all devices
    tokens: float  # sampled for training
    seeds: tuple[int, ...]


def read(spec: ExperimentSpec, base: Path, run: Path) -> CitedRun:
    """Returns what a paper says of the run.  `base` is the folder that paths in its spec start from."""
    lines = read_lines(run / "metrics.jsonl")
    facts = provenance(run)
    return CitedRun(
        spec=spec,
        papers=papers_in(_comment(base, run)),
        steps=int(read_status(run).get("step", 0)),
        facts=facts,
        hours=device_hours(lines, facts.get("attempts") or ()),
        tokens=max((line.get("tokens_generated", 0.0) for line in lines), default=0.0),
        seeds=(spec.training.seed,),
    )


def together(runs: Sequence[CitedRun]) -> CitedRun:
    """Returns runs of one spec with several seeds as one: all seeds, and the sums of hours and tokens."""
    return evolve(
        runs[0],
        steps=max(run.steps for run in runs),
        hours=sum(run.hours for run in runs),
        tokens=sum(run.tokens for run in runs),
        seeds=tuple(seed for run in runs for seed in run.seeds),
    )


def cite(run: CitedRun, format: Format) -> str:
    """Returns the text in this format; all but `bibtex` have paragraph and table, `markdown` BibTeX too."""
    entries = "\n\n".join([*(paper.bibtex() for paper in run.papers), software_bibtex()])
    if format == "bibtex":
        return entries
    paragraph, rows = " ".join(_sentences(run, format)), list(_settings(run))
    if format == "latex":
        head = "% needs \\usepackage{booktabs}; the entries for BibTeX: sdkit cite RUN --format bibtex"
        return f"{head}\n{paragraph}\n\n{latex.table(rows, 'Hyperparameters.', 'tab:hyperparameters')}"
    table = "\n".join(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows)
    return f"{paragraph}\n\n| setting | value |\n|---|---|\n{table}\n\n```bibtex\n{entries}\n```"


def _comment(base: Path, run: Path) -> str:
    """The first comment of the run's method page, or of the run file if that holds the method itself."""
    page = method_page(run)
    if page is None:
        path = run / "spec.yaml"
    elif is_page_name(page) and page in packaged_methods():
        path = Path(packaged_page(page))
    else:
        path = base / page
    return first_comment(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else ""


def _sentences(run: CitedRun, format: Format) -> Iterator[str]:
    """The sentences of the methods paragraph, ready for the format."""
    plain = latex.escape if format == "latex" else str
    spec, method = run.spec, plan_method(run.spec)
    following = ""
    if run.papers:
        paper = run.papers[0]
        cited = f"{latex.escape(paper.label)}~\\cite{{{paper.key}}}" if format == "latex" else paper.label
        following = f", following {cited}"
    software = "sdkit~\\cite{sdkit}" if format == "latex" else "sdkit"
    trained = f"We trained {_student(spec)} for {counted(run.steps, 'step')} with"
    yield f"{plain(trained)} {software}{following}."
    yield plain(_rollouts(spec))
    if spec.teacher:
        yield plain(f"The teacher was {_teacher(spec.teacher.describe())}.")
    yield plain(_objective(method.objective))
    yield plain(_optimization(spec))
    yield plain(_data(spec))
    yield plain(_cost(run))


def _student(spec: ExperimentSpec) -> str:
    lora = spec.model.lora
    what = "all weights" if lora is None else f"LoRA adapters of rank {lora.r} (α = {lora.lora_alpha:g})"
    return f"{what} of {_model(spec)} in {spec.model.dtype}"


def _model(spec: ExperimentSpec) -> str:
    """The start model by its id on the hub, or by the name of its folder: a paper names no path."""
    path = spec.model.path.removeprefix(PREFIX)
    return Path(path).name if path.startswith((".", "/", "~")) else path


def _rollouts(spec: ExperimentSpec) -> str:
    rollout, training = spec.rollout, spec.training
    prompts = f"Each step used {counted(training.prompts_per_step, 'prompt')}"
    if isinstance(rollout.sampled_by, DatasetSamples):
        return f"{prompts} with {rollout.sampled_by.describe()}, of at most {rollout.max_new_tokens} tokens."
    kept = f", {filters[0]}" if (filters := re.findall(r"kept where .*", rollout.describe())) else ""
    truncation = (f", top-p {rollout.top_p:g}" if rollout.top_p < 1 else "") + (
        f", top-k {rollout.top_k}" if rollout.top_k else ""
    )
    number = counted(rollout.completions_per_prompt, "completion")
    return (
        f"{prompts} and {number} of at most {rollout.max_new_tokens} tokens for each, sampled at temperature "
        f"{rollout.temperature:g}{truncation} ({rollout.sampled_by.describe()}){kept}."
    )


def _teacher(description: str) -> str:
    """`average of the student, sees x` as the end of a sentence."""
    for start, article in (("average ", "an exponential moving "), ("copy ", "a "), ("by column", "chosen ")):
        if description.startswith(start):
            description = article + description
    return re.sub(r", sees (?:the )?(.+)$", r", which saw the \1", description)


def _objective(terms: Sequence[str]) -> str:
    """The objective in a sentence; the details of each term stand in parentheses."""
    parts: list[str] = []
    rest = ""
    for term in terms:
        name, _, text = term.partition(": ")
        if name == "route":
            rest = f" {text[0].upper()}{text[1:]}."
            continue
        head, _, details = text.partition(", ")
        parts.append(f"the {head}" + (f" ({details})" if details else ""))
    joined = parts[0] if len(parts) == 1 else f"the sum of {'; and '.join(['; '.join(parts[:-1]), parts[-1]])}"
    return f"The loss was {joined}.{rest}"


def _optimization(spec: ExperimentSpec) -> str:
    optimizer, updates = spec.optimizer, spec.training.updates_per_rollout
    several = f"{updates} optimizer steps on each batch" if updates > 1 else "one optimizer step on each batch"
    schedule = f"a {optimizer.lr_scheduler_type} schedule"
    if optimizer.warmup_steps:
        schedule += f" after {counted(optimizer.warmup_steps, 'step')} of linear warm-up"
    betas = ", ".join(f"{beta:g}" for beta in optimizer.betas)
    return (
        f"We took {several} with AdamW (learning rate {optimizer.lr:g}, {schedule}; betas {betas}; weight decay "
        f"{optimizer.weight_decay:g}), and clipped gradients to a norm of {optimizer.max_grad_norm:g}."
    )


def _data(spec: ExperimentSpec) -> str:
    suites = [f"{name} ({_source(data_in_full(spec, suite.data))})" for name, suite in spec.suites.items()]
    held_out = f", and evaluated on {' and '.join(suites)}" if suites else ""
    return f"We trained on {_source(data_in_full(spec, spec.data))}{held_out}."


def _source(data: DataSpec) -> str:
    source = data.source
    match source:
        case HubSource():
            parts = ", ".join(filter(None, [source.name, source.split]))
            name = f"{source.path} ({parts})"
        case ReasoningGymSource():
            name = f"{source.size} generated rows of reasoning-gym's task {source.task}"
        case VerifiersSource():
            settings = ", ".join(f"{key}: {value}" for key, value in source.config.items())
            name = f"the verifiers taskset {source.id}{settings and f' ({settings})'}"
        case InlineSource():
            name = counted(len(source.rows), "row") + " written for the run"
        case LocalFile() | DiskSource():
            name = Path(source.path).name
    return f"the first {data.limit} rows of {name}" if data.limit else name


def _cost(run: CitedRun) -> str:
    attempts = run.facts.get("attempts") or ()
    last = attempts[-1] if attempts else {}
    accelerators = (last.get("hardware") or {}).get("accelerators") or ()
    ranks, device = last.get("ranks", 1), accelerators[0] if accelerators else "CPU"
    where = f"on {ranks} × {device}" if accelerators or ranks > 1 else "on a CPU"
    sampled = f" and sampled {run.tokens:,.0f} tokens" if run.tokens and not _from_data(run.spec) else ""
    hours = f"{run.hours:.2g}" if run.hours < 10 else f"{run.hours:.0f}"
    seeds = listed(run.seeds, " and ")
    who = f"The run, with seed {seeds}," if len(run.seeds) == 1 else f"The {len(run.seeds)} runs, with seeds {seeds},"
    return f"{who} took {hours} device hours {where}{sampled}."


def _from_data(spec: ExperimentSpec) -> bool:
    return isinstance(spec.rollout.sampled_by, DatasetSamples)


def _settings(run: CitedRun) -> Iterator[tuple[str, str]]:
    """The rows of the table of hyperparameters."""
    spec, method = run.spec, plan_method(run.spec)
    rollout, training, optimizer, lora = spec.rollout, spec.training, spec.optimizer, spec.model.lora
    yield "start model", _model(spec)
    yield "trained weights", "all" if lora is None else f"LoRA, rank {lora.r}, alpha {lora.lora_alpha:g}"
    yield "precision", f"{spec.model.dtype}, float32 master weights"
    for term in method.objective:
        name, _, text = term.partition(": ")
        yield ("route" if name == "route" else f"loss term {name}"), text
    for role in method.roles:
        name, _, text = role.partition(": ")
        yield name, text
    yield "steps", str(run.steps)
    yield "prompts per step", str(training.prompts_per_step)
    yield "completions per prompt", str(rollout.completions_per_prompt)
    yield "longest completion, tokens", str(rollout.max_new_tokens)
    yield "optimizer steps per rollout batch", str(training.updates_per_rollout)
    yield "optimizer", f"AdamW, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, eps {optimizer.eps:g}"
    yield "learning rate", f"{optimizer.lr:g}, {optimizer.lr_scheduler_type}, {optimizer.warmup_steps} warm-up steps"
    yield "weight decay", f"{optimizer.weight_decay:g}"
    yield "gradient clipping", f"norm {optimizer.max_grad_norm:g}"
    yield "training data", _source(spec.data)
    yield ("seed" if len(run.seeds) == 1 else "seeds"), ", ".join(map(str, run.seeds))
    yield "device hours", f"{run.hours:.3g}"
    versions: Mapping[str, str] = run.facts.get("versions") or {}
    if versions:
        yield "software", ", ".join(f"{name} {version}" for name, version in versions.items())
