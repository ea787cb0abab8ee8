"""Environments: the reward that judges turns, the texts between them, and the budgets of a trajectory."""

from __future__ import annotations

from collections.abc import Iterator

from sdkit.language import specs
from sdkit.language.columns import logs_chats, scores_training_rows, training_reward
from sdkit.language.errors import did_you_mean, listed, outside, shorten, spelled
from sdkit.language.rules.base import (
    Context,
    Finding,
    at_user_file,
    columns_of,
    reward_advantages,
    run_rule,
    slots,
    terms,
)
from sdkit.language.rules.prompts import template_faults
from sdkit.language.templates import TemplateError, fields, parse
from sdkit.language.user_tools import class_faults, function_faults, opens_prompts


@run_rule("a retry environment has a reward that judges its turns")
def environment_reward(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The environment asks the reward after every turn, in training and in every suite."""
    for place, environment in specs.environments_of(spec.environment, specs.RetryEnvironment):
        path, name, known = (*place, "reward"), environment.reward or training_reward(spec), list(spec.rewards)
        if name is None:
            which = "there are several rewards" if known else "there are no rewards"
            yield place, f"nothing judges the turns: {which}", f"name one of rewards as {spelled(path)}"
        elif name not in known:
            if environment.reward:  # an unknown `reward` is a finding of its own
                yield path, f"reward {shorten(name)} {outside(known)}", did_you_mean(name, known)
        elif not scores_training_rows(spec, name):
            yield (
                path,
                f"reward {shorten(name)} cannot score the training rows",
                "name a reward whose column they have",
            )


@run_rule("the student acts in an environment")
def environment_sampler(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Completions of a data set or of a teacher would be judged, and answered, as if the student had written them."""
    if spec.environment is None:
        return
    kind = spec.rollout.sampled_by.kind
    if not isinstance(spec.rollout.sampled_by, specs.StudentSamples):
        yield (
            ("rollout", "sampled_by"),
            f"sampled_by is {kind}, but there is an environment",
            "use sampled_by: student",
        )


@run_rule("trajectories that start with a demonstration have an environment, and the turns of a chat")
def demonstrated_start(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The environment answers the demonstration's turns.  They are those of the assistant in a logged chat, which a column
    `{turns: …}` reads.
    """
    starts_with, path = spec.rollout.starts_with, ("rollout", "sampled_by", "starts_with")
    if starts_with is None:
        return
    if spec.environment is None:
        yield path, "nothing answers the turns of a demonstration: there is no environment", "add environment: …"
    name, known = starts_with.column, columns_of(spec, spec.data)
    if name not in known:
        message = f"{context.stated((*path, 'column'), name)}, which {outside(known)}"
        hint = did_you_mean(name, known) or f"add data.columns.{name}: {{turns: …}}"
        yield (*path, "column"), message, hint
    elif not isinstance(known[name], specs.ChatTurns):
        message = f"column {shorten(name)} is not the turns of a chat"
        yield (*path, "column"), message, f"use data.columns.{name}: {{turns: …}}"


@run_rule("trajectories that are sampled at their own pace have vLLM")
def environment_scheduling(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A trajectory's next turn is sampled while others are: servers do this, and vLLM in the trainer's process, if no other
    process shares it.  A recording has complete trajectories.
    """
    if spec.environment is None or spec.environment.scheduling == "lockstep":
        return
    backend, path = spec.rollout.backend, ("environment", "scheduling")
    if not isinstance(backend, specs.VllmBackend | specs.VllmServerBackend | specs.ReplayBackend):
        stated = context.stated(("rollout", "backend"), backend.kind)
        hint = "use rollout.backend: vllm or vllm_server, or scheduling: lockstep"
        yield path, f"scheduling is continuous, but {stated}", hint
    elif isinstance(backend, specs.VllmBackend) and backend.tensor_parallel_size > 1:
        stated = f"tensor_parallel_size is {backend.tensor_parallel_size}: its processes must sample the same requests"
        yield path, f"scheduling is continuous, but {stated}", "use scheduling: lockstep"


@run_rule("an environment's texts are templates of the feedback")
def environment_text(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """`{feedback}` is what the reward says about the turn; without it there is nothing to fill in."""
    texts = [
        ((*place, key), getattr(environment, key), allowed)
        for place, environment in specs.environments_of(spec.environment, specs.RetryEnvironment)
        for key, allowed in (("says", ["feedback"]), ("without_feedback", []))
    ]
    for path, text, allowed in texts:
        yield from template_faults(path, text)
        try:
            used = list(fields(parse(text)))
        except TemplateError:
            continue
        for field in used:
            if field.name not in allowed:
                fault = outside(allowed) if allowed else "cannot be filled in: the reward gave no feedback"
                yield path, f"{{{field}}} {fault}", did_you_mean(field.name, allowed)


@run_rule("a trajectory has room for a turn")
def environment_budget(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Otherwise every trajectory ends within its first turn."""
    new = spec.rollout.max_new_tokens
    for path, environment in specs.environments_of(spec.environment, specs.BaseEnvironment):
        limit = environment.max_trajectory_tokens
        if limit and limit <= new:
            stated = context.stated(("rollout", "max_new_tokens"), new)
            yield (
                (*path, "max_trajectory_tokens"),
                f"max_trajectory_tokens is {limit}, but {stated}: no second turn fits",
                f"use more than {new} tokens",
            )


@run_rule("what compares turns, or counts observations, has completions of several turns")
def several_turns(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A completion of one turn has neither a later turn nor an observation.  Several turns come from an environment, or
    from logged chats.
    """
    if isinstance(spec.rollout.sampled_by, specs.DatasetSamples):
        return
    for path, term in terms(spec, specs.LossSpec):
        if spec.environment is None and term.turn_setting:
            message = "this needs completions of several turns, and there is no environment"
            yield (*path, *term.turn_setting), message, "add an environment, or use sampled_by: dataset"
        elif spec.environment and (turns := term.mask.turns) and turns.first > spec.environment.max_turns:
            most = context.stated(("environment", "max_turns"), spec.environment.max_turns)
            yield (*path, "mask", "turns"), f"turn {turns.first} counts first, but {most}: no turn is left", None


@run_rule("the overlong penalty measures completions of one turn")
def environment_overlong(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """It counts back from rollout.max_new_tokens, the limit of a turn, and would punish a second turn as such."""
    if spec.environment is None:
        return
    for path, part in reward_advantages(spec):
        if part.overlong:
            yield (
                (*path, "overlong"),
                "a trajectory of several turns has no length to count back from",
                "set overlong: null",
            )


@run_rule("a user-defined environment exists")
def environment_class(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The file is parsed, not executed.  It must define the class at its top level, with the method `reset` and either `reply`
    or tools, unless it has a base class.  A tool has a docstring that describes every argument, and a type for each.  The
    columns must be mapped.
    """
    known = list(spec.data.columns or {})
    for path, environment in specs.environments_of(spec.environment, specs.FileEnvironment):
        for fault in class_faults(context.file(environment.file), environment):
            yield from at_user_file(path, context, environment.file, fault)
        for place, name in enumerate(environment.columns):
            if known and name not in known:
                message = f"column {shorten(name)} is not mapped: data.columns has {listed(known)}"
                yield (*path, "columns", place), message, did_you_mean(name, known)


@run_rule("functions can be tools")
def environment_tools(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """The file is parsed, not executed.  A tool has a docstring that describes every argument, and a type for each: the model
    is shown both.
    """
    for path, environment in specs.environments_of(spec.environment, specs.ToolsEnvironment):
        for fault in function_faults(context.file(environment.file), environment):
            yield from at_user_file(path, context, environment.file, fault)


@run_rule("prompts to which an environment appends have a limit")
def environment_opening(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """What `reset` returns is part of the first prompt, whose length is then known only when the trajectory begins."""
    if spec.rollout.max_prompt_tokens is None and opens_prompts(spec.environment, context.loaded.folder):
        yield (
            ("environment",),
            "reset may return a text, which makes prompts longer",
            "set rollout.max_prompt_tokens",
        )


@run_rule("a reward of kind environment has an environment that gives it")
def environment_gives_reward(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """It is what `get_reward()` of the environment's class returns, or what the steps give; functions have none, and `retry`
    judges by another reward.
    """
    kinds = (specs.RetryEnvironment, specs.ToolsEnvironment)
    judged = list(specs.environments_of(spec.environment, *kinds))
    if spec.environment and not judged:
        return
    for name, reward in spec.rewards.items():
        if isinstance(reward, specs.EnvironmentReward):
            stated = "there is no environment"
            if judged:
                path, environment = judged[0]
                stated = f"{spelled(path)} is of kind {environment.kind}, which gives none"
            yield ("rewards", name), f"{shorten(name)} is the environment's reward, but {stated}", None


@run_rule("a context that differs by turn has turns")
def turn_context(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """Feedback on each turn comes from the environment, and so do what followed a turn and the turns to write about, unless
    the data set has chats of several turns.  Without it every such slot would be empty, and `every_turn` would name the
    only one.
    """
    if spec.environment is not None:
        return
    if isinstance(spec.sees, specs.MovingContext) and spec.sees.every_turn and not logs_chats(spec):
        message = "completions have one turn: there is no environment, and no logged chat"
        yield ("teacher", "sees", "every_turn"), message, "add environment: …, or remove every_turn"
    for path, slot in slots(spec, specs.Feedback):
        if slot.of == "turn":
            yield (
                (*path, "of"),
                "feedback on each turn comes from an environment, and there is none",
                "use of: trajectory",
            )
    if spec.rollout.sampled_by.completion_column is None:
        for path, _ in slots(spec, specs.NextTurns):
            yield path, "nothing follows a turn: there is no environment", "add environment: …, or remove the slot"
        for path, slot in slots(spec, specs.Written):
            if slot.of == "turn":
                message = "there are no turns to write about: there is no environment"
                yield (*path, "of"), message, "use of: trajectory"


@run_rule("the longest turn's row fits one forward pass of the teacher")
def turn_rows(spec: specs.ExperimentSpec, context: Context) -> Iterator[Finding]:
    """A teacher whose context differs by turn reads all of the trajectory before a turn, and the turn, in one row."""
    sees, budget = spec.sees, spec.training.micro_batch_tokens
    if spec.environment is None or sees is None or not sees.by_turn or sees.max_prompt_tokens is None:
        return
    longest = spec.longest_completion()
    need = sees.max_prompt_tokens + longest
    if budget < need and longest + (spec.rollout.max_prompt_tokens or 1) <= budget:  # else micro_batch reports it
        path = ("training", "micro_batch_tokens")
        stated = context.stated(path, budget)
        message = (
            f"{stated}, less than the teacher's row of the last turn: max_prompt_tokens {sees.max_prompt_tokens} and the "
            f"longest trajectory, {longest}"
        )
        yield path, message, f"use micro_batch_tokens: {need} or more"
