"""Served teachers: what a server can return, and where prompts may be sent."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit

from sdkit.language import specs
from sdkit.language.errors import Path, shorten, spelled
from sdkit.language.rules.base import Context, Finding, method_rule, terms


@method_rule("a served teacher has a valid address")
def server_url(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Prompts and completions leave this machine only if the spec allows it, and specs contain no passwords."""
    for path, weights in spec.served_teachers():
        for message, hint in address_faults(weights.url, weights.allow_remote, "prompts would be sent there"):
            yield (*path, "url"), message, hint


def address_faults(url: str, allow_remote: bool, consequence: str) -> Iterator[tuple[str, str | None]]:
    """What is wrong with a server's address, each with a hint; `consequence` says what a remote server would receive."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        yield f"{shorten(url)} is no address of a server", "write http://127.0.0.1:8000, say"
    elif "@" in parts.netloc:
        yield "a spec holds no passwords", "leave the user out of the address; see key_from"
    elif parts.query or parts.fragment:
        yield f"{shorten(url)} has more than an address and a path", None
    elif parts.path.rstrip("/").endswith("/v1"):
        yield f"{shorten(url)} ends in /v1, which sdkit adds itself", "leave /v1 away"
    elif not allow_remote and not is_loopback(host):
        message = f"{shorten(host)} is another machine, and {consequence}"
        yield message, "set allow_remote: true if that is meant, or forward a local port to it"


def is_loopback(host: str) -> bool:
    """Whether the host is this machine, without asking the network."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@method_rule("a server's key is in an environment variable")
def server_key(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """Specs are shared and copied into every run directory, so they contain no keys; `key_from` names the
    environment variable that holds one.
    """
    for path, weights in spec.served_teachers():
        if fault := variable_fault(weights.key_from):
            yield (*path, "key_from"), fault, "write key_from: TEACHER_KEY, say, and export it"


def variable_fault(name: str | None) -> str | None:
    """What is wrong with an environment variable's name; None if it is valid."""
    if name is None or re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        return None
    return "this is no name of an environment variable"


@method_rule("a served teacher is used with a support that a server can return")
def served_support(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """A server returns log-probabilities of its own k likeliest tokens and of the sampled one, but not of the
    whole vocabulary or of tokens chosen by the student.
    """
    if spec.served_top_k is None:
        return
    for path, term in terms(spec, specs.Distillation):
        match term.support:
            case specs.SampledTokenSupport() | specs.TopKSupport(chosen_by="teacher"):
                continue
            case specs.TopKSupport(chosen_by=chosen_by):
                message = f"a server returns its own likeliest tokens, but chosen_by is {chosen_by}"
                yield (*path, "support", "chosen_by"), message, "use chosen_by: teacher"
            case _:
                hint = "use support: {kind: top_k, k: 20, chosen_by: teacher, remainder: tail_bucket}"
                yield (*path, "support"), "a server returns its likeliest tokens, not the whole vocabulary", hint


@method_rule("a served teacher's log-probabilities are used at temperature 1")
def served_temperature(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """vLLM always returns prompt_logprobs at temperature 1.  A renormalized top-k can be brought to another
    temperature afterwards; the mass outside it, and a single sampled token, cannot.
    """
    if spec.served_top_k is None:
        return
    sampled = spec.rollout.temperature
    for path, term in terms(spec, specs.Distillation):
        support = term.support
        rescaled = isinstance(support, specs.TopKSupport) and support.remainder in (
            "renormalize",
            "renormalize_teacher",
        )
        temperature = sampled if term.temperature is None else term.temperature
        if temperature != 1 and not rescaled:
            where = (*path, "temperature") if term.temperature else ("rollout", "temperature")
            what = "the sampled token" if support.kind == "sampled_token" else "this remainder"
            hint = f"set {spelled((*path, 'temperature'))}: 1"
            if isinstance(support, specs.TopKSupport):
                hint += ", or use remainder: renormalize"
            yield (where, f"a server returns temperature 1, but {what} needs {_at(temperature)}", hint)
    if sampled != 1:
        for path in _at_sampling_temperature(spec):
            message = "a server returns temperature 1, but this needs rollout.temperature, "
            yield path, f"{message}{_at(sampled)}", "set rollout.temperature: 1"


def _at(temperature: object) -> str:
    return f"{temperature:g}" if isinstance(temperature, int | float) else "one that moves"


def _at_sampling_temperature(spec: specs.MethodSpec) -> Iterator[Path]:
    """The settings that need the teacher's log-probability at the sampling temperature."""
    for path, term in terms(spec, specs.PolicyGradient):
        if term.advantage.log_ratio:
            yield (*path, "advantage")
    for name, term in spec.losses.items():
        for statistic, key in term.statistics():
            if statistic == "teacher_logprobs" and key[0] != "advantage":
                yield ("losses", name, *key)


@method_rule("no term needs a served teacher's entropy")
def served_entropy(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """The entropy needs the full distribution; a server returns a few tokens."""
    if spec.served_top_k is None:
        return
    for name, term in spec.losses.items():
        for statistic, key in term.statistics():
            if statistic == "teacher_entropy":
                message = "this needs the teacher's entropy, which a server does not return"
                yield ("losses", name, *key), message, "use another mask or weight"


@method_rule("a served teacher is not blended")
def served_blend(spec: specs.MethodSpec, context: Context) -> Iterator[Finding]:
    """A blend multiplies full distributions and takes the top k of the result; a server returns the top k of
    its own distribution.
    """
    if spec.served_top_k is not None and spec.blend:
        message = "a blend needs the teacher's full distribution, but a server returns a few tokens"
        yield ("teacher", "blend"), message, "remove blend"
