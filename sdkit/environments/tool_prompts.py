"""How the tools of environments are shown in prompts."""

from __future__ import annotations

from sdkit.data.call_formats import choose_format
from sdkit.data.prompts import Prompter
from sdkit.environments.interface import Environment
from sdkit.language import specs


def show_tools(prompter: Prompter, environment: Environment, spec: specs.Environment) -> Prompter:
    """Returns a prompter that shows the environment's tools, or the same one if it has none.

    Raises BadData if the chat template cannot have the format of calls that the spec names.
    """
    if not environment.tools:
        return prompter
    calls = spec.calls if isinstance(spec, specs.CodeEnvironment) else specs.ToolCalls()
    return prompter.with_tools(choose_format(prompter, environment.tools, calls))
