"""The command line: find the command, run it, and turn errors into one line and an exit code.

Exit codes: 0 done, 2 wrong input or options, 3 damaged data, 75 stopped by a signal after saving, 1
anything else.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import importlib
import os
import resource
import sys
import traceback

import click

from portrait_dist.errors import InputError, PortraitDistError, nearest, printable, shorten
from portrait_dist.system import parent  # noqa: F401  remembers it before the long imports
from portrait_dist.system.info import environment_number

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
    "video": "portrait_dist.commands.video:video",
    "serve": "portrait_dist.commands.serve:serve",
    "export": "portrait_dist.commands.export:export",
    "submit": "portrait_dist.commands.submit:submit",
    "status": "portrait_dist.commands.status:status",
    "report": "portrait_dist.commands.report:report",
    "doctor": "portrait_dist.commands.doctor:doctor",
    "completion": "portrait_dist.commands.completion:completion",
}

MOST_DESCRIPTORS = 1_048_576
"""Linux's own largest limit; programs that are started from here may walk all of them."""

DISK_ERRORS = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE", "EFBIG", "EMFILE", "ENFILE"),
        *("EACCES", "EPERM", "ENOENT", "EEXIST", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP"),
    )
)
"""What the file system says of a disk or a path; other operating system errors may be bugs."""
LONGEST_WORD = 1000
NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)
"""What it says of a path that cannot be one."""


class LazyGroup(click.Group):
    """Imports a command's module only when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help text."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        # Named as text: importing all commands would import torch for --help.
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or suggest the one that was meant."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(
                f"no command '{shorten(args[0])}'.{nearest(args[0], list(COMMANDS))} "
                "'portrait-dist --help' lists them."
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="portrait-dist")
def portrait_dist() -> None:
    """Portrait background removal at any scale: from photos to masks and cut-outs."""


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code.

    An error becomes one line on stderr and, with ``--json``, one JSON object on stdout: ``error``,
    ``exit_code``, and the error's ``result``. An error that nobody foresaw keeps its traceback; it
    leaves as an exception (exit code 1).

    Args:
        arguments: those after the program's name.
    """
    try:
        _refuse_nul(arguments)
        result = portrait_dist.main(
            args=arguments, prog_name="portrait-dist", standalone_mode=False
        )
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except (Exception, KeyboardInterrupt) as error:
        # click makes an Abort of EOFError too, which a library raises for a file cut short
        cut_short = isinstance(error, click.Abort) and isinstance(error.__cause__, EOFError)
        return _report(error.__cause__ if cut_short and error.__cause__ else error, arguments)


def _refuse_nul(arguments: list[str]) -> None:
    # No shell can give one; a caller in Python can, and each use of it would raise ValueError.
    for argument in arguments:
        if "\0" in argument:
            raise InputError(f"{argument!r}: holds a NUL character; give it without")


def _report(error: BaseException, arguments: list[str]) -> int:
    """Print an error and return its exit code; raise one that nobody foresaw."""
    expected = _explain(error)
    code, message = expected or (1, f"{type(error).__name__}: {error}")
    # "in arguments": click may have failed before it parsed the option.
    if "--json" in arguments and not getattr(error, "secondary", False) and not _comes_back():
        from portrait_dist.commands import to_json

        plain = one_line(message.removeprefix("portrait-dist: "))
        click.echo(to_json(getattr(error, "result", None) or {}, error=plain, exit_code=code))
    if expected is None:
        raise error
    if getattr(error, "quiet", False):
        return code
    if "--debug" in arguments and not isinstance(error, click.ClickException):
        traceback.print_exception(error)
    else:
        complain(message)
    return code


def _comes_back() -> bool:
    """Return whether torchrun starts this rank again, which then prints the one JSON object."""
    restarts = environment_number("TORCHELASTIC_RESTART_COUNT")
    return restarts < environment_number("TORCHELASTIC_MAX_RESTARTS")


def _explain(error: BaseException) -> tuple[int, str] | None:
    """Exit code and line for people; None for an error that nobody foresaw."""
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        path = context.command_path if context else "portrait-dist"
        return 2, f"{path}: {error.format_message()}"
    if isinstance(error, PortraitDistError):
        return error.exit_code, f"portrait-dist: {error}"
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return 1, (
            "portrait-dist: interrupted; nothing half-written is left, run the same command again"
        )
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        name = f"{shorten(error.filename)}: " if error.filename is not None else ""
        if error.errno in NO_PATH:
            return 2, f"portrait-dist: {name}{error.strerror}; give another path"
        return 1, (
            f"portrait-dist: {name}{error.strerror}; see the path and the disk, then run again "
            "(--debug shows where)"
        )
    return None


def one_line(message: str) -> str:
    """Join the lines of a message, and cut what is too long for a name or a path that is there."""
    words = message.split()
    return " ".join(shorten(word) if len(word) > LONGEST_WORD else word for word in words)


def complain(message: str) -> None:
    """Print a message as one line on stderr."""
    click.echo(printable(one_line(message)), err=True)


def _raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard one.

    Gloo opens a socket to each rank and the stream keeps shards open: 512 ranks and 512 shards pass
    the usual 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, MOST_DESCRIPTORS) if hard != resource.RLIM_INFINITY else MOST_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and wanted > soft:
        with contextlib.suppress(OSError, ValueError):  # a limit is no reason not to work
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    """Run this process's command line: ``portrait-dist`` or ``python -m portrait_dist``."""
    rank_of_a_job = "TORCHELASTIC_RUN_ID" in os.environ
    _raise_descriptor_limit()
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # stderr is closed
        faulthandler.enable()  # a native crash tells where
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout at its exit, and would complain of the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    if rank_of_a_job:
        # Everything is written and the process group is left. Native threads (gloo's, decoders')
        # may abort an interpreter that shuts down under them, and torchrun would take the finished
        # rank for a failed one.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
