"""The command line: finds the command, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done, 2 wrong input or options, 3 damaged data, 75 stopped by a signal after saving, 1 anything else.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys

import click

from portrait_dist.errors import PortraitDistError, nearest

COMMANDS = {
    "quickstart": "portrait_dist.commands.quickstart:quickstart",
    "synth": "portrait_dist.commands.synth:synth",
    "prepare": "portrait_dist.commands.prepare:prepare",
    "pack": "portrait_dist.commands.pack:pack",
    "verify": "portrait_dist.commands.verify:verify",
    "show": "portrait_dist.commands.show:show",
    "train": "portrait_dist.commands.train:train",
    "evaluate": "portrait_dist.commands.evaluate:evaluate",
    "predict": "portrait_dist.commands.predict:predict",
    "export": "portrait_dist.commands.export:export",
    "submit": "portrait_dist.commands.submit:submit",
    "status": "portrait_dist.commands.status:status",
    "report": "portrait_dist.commands.report:report",
    "doctor": "portrait_dist.commands.doctor:doctor",
    "completion": "portrait_dist.commands.completion:completion",
}


class LazyGroup(click.Group):
    """Imports a command's module only when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(
                f"no command '{args[0]}'.{nearest(args[0], list(COMMANDS))} 'portrait-dist --help' lists them."
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="portrait-dist")
def portrait_dist() -> None:
    """Portrait background removal at any scale: data, shards, distributed training, masks and cut-outs."""


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: the words after the program's name.
    """
    try:
        result = portrait_dist.main(
            args=arguments, prog_name="portrait-dist", standalone_mode=False
        )
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        path = (
            error.ctx.command_path
            if isinstance(error, click.UsageError) and error.ctx
            else "portrait-dist"
        )
        complain(f"{path}: {error.format_message()}")
        return 2
    except PortraitDistError as error:
        if "--debug" in arguments:
            raise
        if not error.quiet:
            complain(f"portrait-dist: {error}")
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        complain(
            "portrait-dist: interrupted; nothing half-written is left, run the same command again"
        )
        return 1


def complain(message: str) -> None:
    """Print a message as one line on stderr."""
    click.echo(" ".join(message.split()), err=True)


def main() -> None:
    """Entry point of the ``portrait-dist`` script and of ``python -m portrait_dist``."""
    rank_of_a_job = "TORCHELASTIC_RUN_ID" in os.environ
    if rank_of_a_job:
        faulthandler.enable()  # a native crash of a rank tells where
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if rank_of_a_job:
        # Everything is written and the process group is left. Native threads (gloo's, decoders') may abort an interpreter
        # that shuts down under them, and torchrun would take the finished rank for a failed one.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
