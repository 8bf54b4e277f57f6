"""``completion``: let bash, zsh and fish complete commands, options and ``key=value`` arguments.

It is click's own completion; what is ours are the settings after ``train``.
"""

from __future__ import annotations

from dataclasses import dataclass

import click
from click.shell_completion import CompletionItem, get_completion_class

from portrait_dist.commands import command

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Completion:
    """The script for one shell."""

    shell: str
    script: str


def script(shell: str, program: click.Command) -> str:
    """Return the lines that a shell has to read to complete ``portrait-dist``.

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
    """Complete a ``key=value`` argument: the keys, and after ``key=`` the values it can take.

    bash takes ``=`` as an argument of its own, and click hides it where it is the last:
    ``train.precision=`` is asked for as ``""`` after ``train.precision``, and ``train.precision=b``
    as ``b`` after ``train.precision`` and ``=``.
    """
    from portrait_dist.config import settings

    key, equals, begun = incomplete.partition("=")
    before = [part for part in context.params.get(parameter.name or "") or () if part]
    if before and before[-1] == "=":
        return [
            CompletionItem(value) for value in _values(before[-2]) if value.startswith(incomplete)
        ]
    if incomplete == "" and before and before[-1] in settings():
        return [CompletionItem(value) for value in _values(before[-1])]
    if equals:
        return [
            CompletionItem(f"{key}={value}") for value in _values(key) if value.startswith(begun)
        ]
    return [
        CompletionItem(f"{name}=", help=setting.help)
        for name, setting in settings().items()
        if name.startswith(key)
    ]


def _values(key: str) -> list[str]:
    """Return the values of a setting, where they are few."""
    from portrait_dist.config import settings

    if key not in settings():
        return []
    setting = settings()[key]
    return ["true", "false"] if setting.kind is bool else list(setting.choices)


@command("completion", summary=lambda result: result.script)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> Completion:
    r"""Print the script that lets a shell complete commands, options and key=value arguments.

    \b
        bash: echo 'eval "$(portrait-dist completion bash)"' >> ~/.bashrc
        zsh:  echo 'eval "$(portrait-dist completion zsh)"' >> ~/.zshrc      (after compinit)
        fish: portrait-dist completion fish > ~/.config/fish/completions/portrait-dist.fish
    """
    return Completion(shell, script(shell, click.get_current_context().find_root().command))
