"""`sdkit smoke` and `sdkit train --dry-run`: plays environments with scripted turns, before a model writes any.

An environment is the run's own, in processes of its own and with the run's time limits.  A turn calls each tool, with
arguments made up from its schema; others call an unknown tool or nothing, and one is cut by a limit.  Where turns are answered
as text, they are texts of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path as Folder
from typing import cast

from attrs import evolve, frozen
from rich.console import Console

from sdkit.batches import Completion, Row, SamplingParams, SamplingRequest
from sdkit.data.observations import ObservationEncoder
from sdkit.data.prompts import Ids, Prompter
from sdkit.data.rows import load_rows
from sdkit.data.sources import START
from sdkit.data.turn_ends import end_token
from sdkit.environments import open_environments
from sdkit.environments.host import EnvironmentFault
from sdkit.environments.tool_calls import made_up_arguments
from sdkit.environments.tool_prompts import show_tools
from sdkit.environments.trajectories import TrajectorySampler
from sdkit.language import columns, specs
from sdkit.language.errors import BadData, Path, blaming, shorten
from sdkit.models import tiny
from sdkit.spans import Call
from sdkit.stdout import print_warning
from sdkit.train.inputs import RunData
from sdkit.train.smoke import VOCABULARY, stand_in_rows

TURNS = 3
"""Turns of a trajectory at most."""
ROWS = 4
"""Rows of each environment on which a trajectory begins."""
COPIES = 2
"""Trajectories of a script, which must begin alike."""
SHOWN = 100
"""Characters of an observation that are printed."""
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=4096)
ANSWER, UNKNOWN_TOOL = "An answer.", "unknown_tool"
Script = Sequence[tuple[Ids, bool]]
"""The ids of each turn, and whether it is complete; the last one is repeated."""
OpenedPrompt = Callable[[SamplingRequest, Row, str], Ids]
"""The prompt of a request and its row, with a text that the environment appends."""
BY_CLASS = ("reset", "get_reward", "close")
"""Calls that get nothing that was made up but the turns before."""


@frozen(kw_only=True)
class Trial:
    """What the environments of a run file are played with."""

    spec: specs.ExperimentSpec
    base: Folder  # from which paths start
    rows: Sequence[Row]
    rows_are_real: bool  # False: stand-ins, on which `reset` may fail
    prompter: Prompter  # shows no tools
    end: int  # the token that ends a turn
    opened_prompt: OpenedPrompt | None = None  # None: as the prompter renders it

    def play(self, console: Console, kind: type[specs.HostedEnvironment]) -> list[str]:
        """Play every environment of this kind, and print what it answers; returns what was played, in words.

        A tool or `reply` that fails on what was made up is a warning, and so is `reset` on a row that is a stand-in.
        Raises BadData if an environment cannot be loaded or fails otherwise: it does not take the arguments that it is given,
        returns what it must not, or appends more to a prompt than `rollout.max_prompt_tokens` allows.
        """
        whole, played = self.spec.environment, []
        for path, hosted in specs.environments_of(whole, kind):
            spec = cast(specs.OneEnvironment, hosted)
            rows = self._rows_of(whole, path)
            limits = {"max_turns": min(spec.max_turns, TURNS), "max_trajectory_tokens": None}
            if not rows:
                console.print(f"environment {spec.describe()}: it has no row to play", markup=False, highlight=False)
                continue
            which = f"{'row' if self.rows_are_real else 'stand-in row'}{'s' if len(rows) > 1 else ''}"
            numbers = ", ".join(str(row.index) for row in rows)
            console.print(f"environment {spec.describe()}, on {which} {numbers}:", markup=False, highlight=False)
            with blaming(*path):
                self._play(console, evolve(spec, on_error="stop_run", **limits), rows)
            played.append(spec.describe())
        return played

    def _rows_of(self, whole: specs.Environment | None, path: Path) -> Sequence[Row]:
        """The first rows of the environment at a path."""
        if not isinstance(whole, specs.RoutedEnvironment):
            return self.rows[:ROWS]
        return [row for row in self.rows if row.text(whole.by) == path[-1]][:ROWS]

    def _play(self, console: Console, spec: specs.OneEnvironment, rows: Sequence[Row]) -> None:
        environment = open_environments(spec, {None: {}}, None, self.base)[None]
        try:
            prompter = show_tools(self.prompter, environment, spec)
            encoder = ObservationEncoder(prompter, self.end)
            sampler = TrajectorySampler(
                environment=environment,
                spec=spec,
                observations=lambda row: encoder,
                end_ids=(self.end,),
                decode=lambda ids: prompter.tokenizer.decode(ids, skip_special_tokens=True),
                opened_prompt=self.opened_prompt or _without_limit(prompter),
                all_ranks=True,
            )
            for name, row, turns in self._scripts(sampler, rows):
                if not self._play_script(console, sampler, name, row, turns):
                    break
        finally:
            environment.close()

    def _play_script(self, console: Console, sampler: TrajectorySampler, name: str, row: Row, turns: Script) -> bool:
        """Play one trajectory, and print what it has; False if it could not begin."""
        prompter = sampler.observations(row).prompter
        request = SamplingRequest(prompt_ids=prompter.student_ids(row), seed=row.index)
        try:
            backend = _ScriptedTurns(chain(turns, repeat(turns[-1])))
            made, _ = sampler.sample(backend, [request] * COPIES, [row] * COPIES, SAMPLING)
        except EnvironmentFault as error:
            if not self._is_excused(error):
                raise BadData(f"row {row.index}: {error.message}", place=error.place) from None
            at = f" ({error.place})" if error.place else ""
            print_warning(console, f"{name}: {error.message}{at}")
            return error.call != "reset"
        console.print(f"  {name}: {_outcome(made, sampler)}", markup=False, highlight=False, soft_wrap=True)
        return True

    def _is_excused(self, error: EnvironmentFault) -> bool:
        """Whether what failed may work on what a model writes, or on other rows."""
        made_up = error.call not in BY_CLASS or (error.call == "reset" and not self.rows_are_real)
        return made_up and not error.fault.misfit

    def _scripts(self, sampler: TrajectorySampler, rows: Sequence[Row]) -> Iterator[tuple[str, Row, Script]]:
        """Yields trajectories to play, each with its name and row."""
        prompter = sampler.observations(rows[0]).prompter
        answer = (*prompter.text_ids(ANSWER), self.end)
        for tool in sampler.environment.tools:
            call = Call(name=tool["function"]["name"], arguments=made_up_arguments(tool))
            written = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
            yield f"{call.name}({written})", rows[0], [(self._call_ids(prompter, call), True), (answer, True)]
        if sampler.environment.tools:
            call = Call(name=UNKNOWN_TOOL, arguments={})
            yield "an unknown tool", rows[0], [(self._call_ids(prompter, call), True), (answer, True)]
        for row in rows:
            text = self._text(sampler.spec, row)
            yield f"row {row.index}, turn {shorten(text)}", row, [((*prompter.text_ids(text), self.end), True)]
        yield "a turn cut by a limit", rows[0], [(answer[:1], False)]

    def _call_ids(self, prompter: Prompter, call: Call) -> Ids:
        assert prompter.calls is not None
        ids = prompter.encode(prompter.calls.turn_text(prompter, call))
        return (*ids[: ids.index(self.end)], self.end) if self.end in ids else (*ids, self.end)

    def _text(self, spec: specs.Environment, row: Row) -> str:
        """A turn: an action's name, or a text of the row that a model may write, or any."""
        if isinstance(spec, specs.GymnasiumEnvironment) and spec.choices:
            return spec.choices[0]
        names = (*columns.answer_columns(self.spec, self.spec.rewards), *columns.shown_columns(self.spec))
        return next((text for name in names if (text := row.text(name))), ANSWER)


@frozen
class _ScriptedTurns:
    """A backend that samples what is scripted, turn by turn, in every trajectory."""

    turns: Iterator[tuple[Ids, bool]]

    def sample(self, requests: Sequence[SamplingRequest], sampling: SamplingParams, /) -> list[Completion]:
        ids, complete = next(self.turns)
        return [Completion(ids=ids, logprobs=None, finished=complete) for _ in requests]


def _outcome(made: Completion, sampler: TrajectorySampler) -> str:
    """What the student was shown, why the trajectory ended, and its rewards."""
    shown = [sampler.decode(made.ids[slice(*span.body)]) for span in made.spans if span.body]
    shown += [text for _, text in made.unanswered]
    parts = [*(shorten(text, SHOWN) for text in shown), f"ended by {made.ending}"]
    if made.turn_rewards:
        parts.append(f"rewards of turns {', '.join(f'{reward:g}' for reward in made.turn_rewards)}")
    if made.reward is not None:
        parts.append(f"reward {made.reward:g}")
    return "; ".join(parts)


def _without_limit(prompter: Prompter) -> OpenedPrompt:
    return lambda request, row, text: prompter.student_ids(row.with_opening(text))


def trial_of_run(data: RunData, base: Folder) -> Trial:
    """Return a trial on the rows and with the chat template of a run whose rows were checked."""
    assert data.turn_end is not None
    return Trial(
        spec=data.spec,
        base=base,
        rows=data.train,
        rows_are_real=True,
        prompter=data.plain_prompter,
        end=data.turn_end,
        opened_prompt=data.opened_prompt,
    )


def trial_of_spec(spec: specs.ExperimentSpec, base: Folder) -> Trial:
    """Return a trial with the tokenizer of smoke runs, on the rows of a spec if they are inline or in a small local file.

    Raises BadData if these rows cannot be read.
    """
    tokenizer = tiny.make_tokenizer(VOCABULARY)
    end = end_token(tokenizer, {})
    assert end is not None
    source = spec.data.source
    file = base / source.path if isinstance(source, specs.FileSource) else None
    are_real = isinstance(source, specs.InlineSource) or bool(file and file.is_file() and file.stat().st_size <= START)
    rows = load_rows(spec.data if are_real else stand_in_rows(spec, list(spec.data.columns or ())), base)
    # The tokenizer's chat template prints no tools and no calls of the data.
    rows = [evolve(row, tools=()) for row in rows if not any(m.get("tool_calls") for m in row.messages)]
    return Trial(spec=spec, base=base, rows=rows, rows_are_real=are_real, prompter=Prompter(tokenizer, {}), end=end)
