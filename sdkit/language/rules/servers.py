"""Rollout servers: where weights and prompts may go, and how far sampling may run ahead of training."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from sdkit.language.errors import Path, shorten, spelled
from sdkit.language.rules.base import Context, Finding, method_rule, terms
from sdkit.language.rules.served import address_faults, is_loopback, variable_fault
from sdkit.language.specs import Distillation, MethodSpec, PolicyGradient, StudentSamples, VllmServerBackend

BACKEND: Path = ("rollout", "backend")


@method_rule("rollout servers have valid, distinct addresses")
def rollout_server_url(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Prompts leave this machine only if the spec allows it.  A server listed twice would get two shares of the
    work.
    """
    backend = spec.rollout.backend
    if not isinstance(backend, VllmServerBackend):
        return
    for i, url in enumerate(backend.urls):
        for message, hint in address_faults(url, backend.allow_remote, "prompts and weights would go there"):
            yield (*BACKEND, "urls", i), message, hint
        if url.rstrip("/") in (other.rstrip("/") for other in backend.urls[:i]):
            yield (*BACKEND, "urls", i), f"{shorten(url)} is there already", "name it once"


def _remote(backend: VllmServerBackend) -> str | None:
    """The first server on another machine; rollout_server_url reports invalid addresses."""
    for url in backend.urls:
        try:
            host = urlsplit(url).hostname
        except ValueError:
            host = None
        if host and not is_loopback(host):
            return url
    return None


@method_rule("a rollout server on another machine has a key")
def rollout_server_key(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Anyone who reaches the port can use the server and send it weights.  The key is in the environment of
    both machines, never in a spec.
    """
    backend = spec.rollout.backend
    if not isinstance(backend, VllmServerBackend):
        return
    hint = "write key_from: ROLLOUT_KEY, say, and export it on both machines"
    if fault := variable_fault(backend.key_from):
        yield (*BACKEND, "key_from"), fault, hint
    elif backend.key_from is None and (url := _remote(backend)):
        yield BACKEND, f"{shorten(url)} is another machine, so its server must ask for a key", hint


@method_rule("a rollout server on another machine shares a weight folder")
def rollout_server_folder(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Weights are passed as files; the default folder is local to this machine."""
    backend = spec.rollout.backend
    if isinstance(backend, VllmServerBackend) and backend.folder is None:
        if url := _remote(backend):
            message = f"{shorten(url)} is another machine, which does not see this one's cache"
            yield BACKEND, message, "write folder: a folder on a disk that both machines see"


@method_rule("only the student samples ahead, and only on servers")
def staleness_source(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """An engine in the trainer's process cannot sample while the trainer trains.  Only for the student is it
    known ahead which weights sample a batch.
    """
    if not spec.rollout.max_staleness:
        return
    path = ("rollout", "max_staleness")
    if not isinstance(spec.rollout.backend, VllmServerBackend):
        message = f"{context.stated(BACKEND, spec.rollout.backend.kind)}, which samples no batch ahead of its turn"
        yield path, message, "use backend: vllm_server, or max_staleness: 0"
    elif not isinstance(spec.rollout.sampled_by, StudentSamples):
        message = f"sampled_by is {spec.rollout.sampled_by.kind}, and only the student's batches can be sampled ahead"
        yield path, message, "use sampled_by: student, or max_staleness: 0"


@method_rule("stale rollouts are corrected for")
def staleness_ratio(spec: MethodSpec, context: Context) -> Iterator[Finding]:
    """Rollouts sampled ahead come from older weights than those being trained.  The ratio to the sampler
    corrects for this, per token or per sequence.
    """
    if not spec.rollout.max_staleness or not isinstance(spec.rollout.sampled_by, StudentSamples):
        return
    for path, term in terms(spec, Distillation, PolicyGradient):
        if not term.importance.sampler:
            key = spelled((*path, "importance", "sampler"))
            message = f"no ratio to the sampler corrects term {shorten(path[-1])} for stale rollouts"
            yield ("rollout", "max_staleness"), message, f"add {key}: {{cap: 2, level: token}}"
