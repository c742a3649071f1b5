"""Chat: the shapes in which data sets have messages, and the text that a model's template makes of them."""

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..settings import short
from ..storage import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[str, str]
"""A role, such as "user", and what it says."""
HELD = ("messages", "conversations")
SPEAKERS = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")}
"""ShareGPT's and other sets' names of the roles that templates know."""


def turns_of(row: dict[str, Any], answer: str, where: str) -> tuple[tuple[Turn, ...], str | None] | None:
    """The turns before the assistant's last one, and that one if there is any; None where the row has no
    messages.

    Read are `messages` and `conversations`, and `prompt` as a list of messages; what follows them is
    `chosen`, `rejected` or `completion`, a list of messages or a string (the preference sets' columns).
    `chosen` and `rejected` without a prompt are whole conversations.

    Args:
        answer: "chosen" or "rejected".

    Raises:
        UserError: a message without role or content, content that is no text, or nothing but an answer.
    """
    row = {key: _parse_messages(row.get(key)) for key in (*HELD, "prompt", answer, "completion")}
    held = next((row[key] for key in HELD if row[key] is not None), None)
    if held is None and isinstance(row["prompt"], list):
        held = row["prompt"]
    given = next((row[key] for key in (answer, "completion") if row[key] is not None), None)
    if held is None and not isinstance(given, list):
        return None
    turns = _read_turns(held, where) if held is not None else ()
    if isinstance(given, str):
        turns = (*turns, ("assistant", given))
    elif isinstance(given, list):
        turns = (*turns, *_read_turns(given, where))
    last = turns[-1][1] if turns and turns[-1][0] == "assistant" else None
    asked = turns if last is None else turns[:-1]
    if not asked:
        raise UserError(f"{where}: its messages hold no turn before the assistant's; give what it answers")
    return asked, last


def _parse_messages(value: Any) -> Any:
    """Messages written as JSON, as a cell of a table has them, as a list; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            items = parse_json(value)
            if items and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items):
                return items
    return value


def _read_turns(messages: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"{where}: its messages are {short(messages)}, and must be a list with one at least")
    return tuple(_read_turn(each, f"{where}, message {number}") for number, each in enumerate(messages, 1))


def _read_turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise UserError(f'{where} is {short(message)}; write {{"role": "user", "content": "…"}}')
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts, as multimodal templates have them
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = None if None in parts else "".join(map(str, parts))
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{where} needs a role and a text as its content; images and tool calls are not read")
    return SPEAKERS.get(role, role), content


def render(turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", where: str) -> str:
    """The text of the turns by the model's own template, with what opens the assistant's next turn: an
    answer, and not the thoughts before it, where the template knows `enable_thinking`.

    Raises:
        UserError: the model has no template, or its template refuses the turns (a role it does not know).
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where} is a chat, and the model's tokenizer has no chat template; use an instruct model, or "
            "plain texts"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        )
    except Exception as error:  # a template is a program, and raises what it likes
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{where}: the model's chat template refuses the messages ({said}); check their roles and order"
        ) from None


def show(turns: Sequence[Turn]) -> str:
    """The turns for people: a line each, the role before it."""
    return "\n".join(f"{role}: {content}" for role, content in turns)
