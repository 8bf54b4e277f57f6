"""Completion of commands, options and ``key=value`` words in bash, zsh and fish, on click's own machinery.

eval "$(portrait-dist completion bash)"
"""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from portrait_dist.commands import command

SHELLS = ("bash", "zsh", "fish")


def script(shell: str, program: click.Command) -> str:
    """The lines that a shell has to read to complete ``portrait-dist``.

    Args:
        shell: one of ``SHELLS``.
        program: the whole command line.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise ValueError(f"no completion for '{shell}'; there is {', '.join(SHELLS)}")
    text = kind(program, {}, "portrait-dist", "_PORTRAIT_DIST_COMPLETE").source()
    if shell == "bash":  # after "train.lr=" comes the value, not a space
        text = text.replace(
            "    return 0\n",
            "    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null\n    return 0\n",
        )
    return text


def complete_setting(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """``shell_complete`` of an argument made of ``key=value`` words: the keys, and after ``key=`` the values it can take.

    bash takes ``=`` as a word of its own, and click hides it where it is the last: ``train.precision=`` is asked for as ``""``
    after ``train.precision``, and ``train.precision=b`` as ``b`` after ``train.precision`` and ``=``.
    """
    from portrait_dist import config

    knobs = config.knobs()
    key, equals, begun = incomplete.partition("=")
    before = [word for word in context.params.get(parameter.name or "") or () if word]
    if before and before[-1] == "=":
        return [
            CompletionItem(value)
            for value in _values(knobs, before[-2])
            if value.startswith(incomplete)
        ]
    if incomplete == "" and before and before[-1] in knobs:
        return [CompletionItem(value) for value in _values(knobs, before[-1])]
    if equals:
        return [
            CompletionItem(f"{key}={value}")
            for value in _values(knobs, key)
            if value.startswith(begun)
        ]
    return [
        CompletionItem(f"{name}=", help=field.metadata["help"])
        for name, field in knobs.items()
        if name.startswith(key)
    ]


def _values(knobs: dict[str, Any], key: str) -> list[str]:
    """What the value of a key can be, where that is a short list."""
    if key not in knobs:
        return []
    if knobs[key].metadata["choices"]:
        return list(knobs[key].metadata["choices"])
    return ["true", "false"] if isinstance(knobs[key].default, bool) else []


@command("completion", summary=lambda result: result["script"])
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> dict[str, Any]:
    """Print the script that lets a shell complete commands, options and key=value words.

    \b
        bash: echo 'eval "$(portrait-dist completion bash)"' >> ~/.bashrc
        zsh:  echo 'eval "$(portrait-dist completion zsh)"' >> ~/.zshrc      (after compinit)
        fish: portrait-dist completion fish > ~/.config/fish/completions/portrait-dist.fish
    """
    return {
        "shell": shell,
        "script": script(shell, click.get_current_context().find_root().command),
    }
