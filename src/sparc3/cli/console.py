"""Shared by all commands: arguments as tables, and console output without other libraries' messages and
terminal escapes."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ..safe_text import LineFormatter, remove_secrets, visible

Command = Callable[[argparse.Namespace], None]
Arguments = Mapping[str, str | tuple[str, dict[str, Any]]]
"""Argument as shown in the help ("model", "--count N") → its line of help, or (line of help, further
options for argparse)."""
Add = Callable[[str, Command, str, Arguments], None]
"""Adds a command: (name, function, line of help, arguments)."""

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
    for name_and_metavar, description in arguments.items():
        name, _, metavar = name_and_metavar.partition(" ")
        text, options = (description, {}) if isinstance(description, str) else description
        command.add_argument(name, help=text, **({**options, "metavar": metavar} if metavar else options))


def say(text: object = "", error: bool = False) -> None:
    """Print text without terminal escapes and secrets, which names of files, models or metrics may
    contain."""
    print(visible(remove_secrets(str(text))), file=sys.stderr if error else sys.stdout)


def configure_logging() -> None:
    """Show our log lines on the console, silence other libraries, and remove secrets from what they still
    log."""
    logging.setLogRecordFactory(_make_safe_record)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(message)s"))
    logger = logging.getLogger("sparc3")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # transformers shows its own bar while it reads a GGUF file
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")


def _make_safe_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """A log record factory that removes secrets for every library: the hub's client logs addresses that it
    retries, with the password in them."""
    record = logging.LogRecord(*args, **kwargs)
    with suppress(TypeError, ValueError):  # a library's wrong format string, which logging reports itself
        record.msg, record.args = remove_secrets(record.getMessage()), None
    return record


def quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # In 8 bits it warns at every product that the input is rounded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
