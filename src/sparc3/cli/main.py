"""The command line: parse, call one function, print. Exit codes: 0 success, 2 the user's mistake, 1 anything
else."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__, distributed
from ..errors import Sparc3Error, UserError, unknown
from . import machine_commands, recipe_commands, stage_commands
from .console import Arguments, Command, add_arguments, configure_logging, say


class _Parser(argparse.ArgumentParser):
    """A parser that raises UserError for mistakes, with the nearest valid name if there is one."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise unknown(
                "command" if action.dest == "command" else f"value of {action.dest}",
                value,
                map(str, action.choices),
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Ends the process if its exit code is not 0, and always under torchrun."""
    command = ""
    try:
        parsed = make_parser().parse_args(
            _join_sbatch_options(sys.argv[1:] if arguments is None else arguments)
        )
        command = parsed.command
        configure_logging()
        parsed.run(parsed)
        distributed.end()
    except UserError as error:
        _stop(2, str(error))
    except Sparc3Error as error:
        _stop(1, str(error))
    except KeyboardInterrupt:
        can_resume = command in ("run", "demo", "attribute")
        _stop(
            130,
            f"interrupted; the same command {'resumes where it stopped' if can_resume else 'starts again'}",
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:  # a bug of ours: Python's traceback, without terminal escapes and secrets
        say(traceback.format_exc(), error=True)
        _stop(1, "this should not have happened; please report it with the lines above")


def _join_sbatch_options(arguments: Sequence[str]) -> list[str]:
    """`--sbatch --qos=long` as `--sbatch=--qos=long`, since argparse accepts no value that begins with a
    dash."""
    joined: list[str] = []
    for argument in map(str, arguments):
        if joined and joined[-1] == "--sbatch":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _stop(code: int, message: str) -> NoReturn:
    say(f"sparc3: {message}", error=True)
    distributed.end(code)
    raise SystemExit(code)


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sparc3",
        description="Find and remove the parts of a model that produce a behaviour, and measure the effect.",
    )
    parser.add_argument("--version", action="version", version=f"sparc3 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Command, help: str, arguments: Arguments) -> None:
        command = commands.add_parser(name, help=help, description=help)
        add_arguments(command, arguments)
        command.set_defaults(run=run)

    for module in (recipe_commands, stage_commands, machine_commands):
        module.add_to(add)
    return parser
