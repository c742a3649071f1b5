"""What every command shares: its arguments as a table, and a console without other libraries' chatter or
terminal escapes."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ..safe_text import LineFormatter, visible, without_secrets

Command = Callable[[argparse.Namespace], None]
Arguments = Mapping[str, str | tuple[str, dict[str, Any]]]
"""An argument as the help shows it ("model", "--count N") → its line of help, or that and what else argparse
is told of it."""
Add = Callable[[str, Command, str, Arguments], None]
"""Adds a command: its name, what it runs, its line of help, its arguments."""

FLAG: dict[str, Any] = {"action": "store_true"}
REPEATED: dict[str, Any] = {"action": "append", "default": []}
REQUIRED: dict[str, Any] = {"required": True}
OPTIONAL: dict[str, Any] = {"nargs": "?"}
INTEGER: dict[str, Any] = {"type": int}

PRECISION: Arguments = {
    "--dtype": ("auto, float32, bfloat16, float16, float64 (default: %(default)s)", {"default": "auto"}),
    "--device": (
        "auto, cpu, cuda, cuda:1, or map: layers over all GPUs and the CPU (default: %(default)s)",
        {"default": "auto"},
    ),
}
MODEL: Arguments = {"model": "a hub id, or the folder of a checkpoint", **PRECISION}
RECIPE: Arguments = {"recipe": "a bundled recipe's name (see sparc3 recipes), or the path of a YAML file"}
SET: Arguments = {"--set a.b=c": ("change a setting of the recipe; may be repeated", REPEATED)}


def add_arguments(command: argparse.ArgumentParser, arguments: Arguments) -> None:
    for shown, about in arguments.items():
        name, _, metavar = shown.partition(" ")
        text, more = (about, {}) if isinstance(about, str) else about
        command.add_argument(name, help=text, **({**more, "metavar": metavar} if metavar else more))


def say(text: object = "", error: bool = False) -> None:
    """Print, without the terminal escapes and secrets that a name of a file, a model or a metric may hold."""
    print(visible(without_secrets(str(text))), file=sys.stderr if error else sys.stdout)


def speak() -> None:
    """Our log lines on the console, other libraries' chatter not; what they log all the same is without
    secrets."""
    logging.setLogRecordFactory(_without_secrets)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(message)s"))
    logger = logging.getLogger("sparc3")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # transformers shows a bar of its own while it reads a GGUF file
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")


def _without_secrets(*args: Any, **named: Any) -> logging.LogRecord:
    """A log record of whatever library: the hub's client names the address it tries again, with the password
    in it."""
    record = logging.LogRecord(*args, **named)
    with suppress(TypeError, ValueError):  # of a library's own mistake, which logging reports in its way
        record.msg, record.args = without_secrets(record.getMessage()), None
    return record


def quiet_transformers() -> None:
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    # In 8 bits it says at every product that the input is rounded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
