"""Chat: parse messages in the formats of various data sets, and render them with a model's template."""

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..settings import short
from ..storage import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = tuple[str, str]
"""A role, such as "user", and its text."""
MESSAGE_KEYS = ("messages", "conversations")
SPEAKERS = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")}
"""Role in ShareGPT and other data sets → the role that templates know."""


def parse_turns(row: dict[str, Any], answer: str, label: str) -> tuple[tuple[Turn, ...], str | None] | None:
    """The turns before the assistant's last one, and the text of that one, if any; None if the row has no
    messages.

    Messages are in `messages`, `conversations`, or `prompt` (as a list). They are followed by `chosen`,
    `rejected` or `completion`, a list of messages or a string (the columns of preference sets). Without a
    prompt, `chosen` and `rejected` are whole conversations.

    Args:
        answer: "chosen" or "rejected".

    Raises:
        UserError: a message without role or content, content that is not text, or only an answer.
    """
    row = {key: _parse_messages(row.get(key)) for key in (*MESSAGE_KEYS, "prompt", answer, "completion")}
    messages = next((row[key] for key in MESSAGE_KEYS if row[key] is not None), None)
    if messages is None and isinstance(row["prompt"], list):
        messages = row["prompt"]
    reply = next((row[key] for key in (answer, "completion") if row[key] is not None), None)
    if messages is None and not isinstance(reply, list):
        return None
    turns = _read_turns(messages, label) if messages is not None else ()
    if isinstance(reply, str):
        turns = (*turns, ("assistant", reply))
    elif isinstance(reply, list):
        turns = (*turns, *_read_turns(reply, label))
    answer_text = turns[-1][1] if turns and turns[-1][0] == "assistant" else None
    question_turns = turns if answer_text is None else turns[:-1]
    if not question_turns:
        raise UserError(f"{label} has no message before the assistant's; add the one that it answers")
    return question_turns, answer_text


def _parse_messages(value: Any) -> Any:
    """Messages written as JSON (in a table's cell) as a list; anything else unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            items = parse_json(value)
            if items and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in items):
                return items
    return value


def _read_turns(messages: Any, label: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list | tuple) or not messages:
        raise UserError(f"{label}: messages must be a non-empty list, but they are {short(messages)}")
    return tuple(
        _read_turn(message, f"{label}, message {number}") for number, message in enumerate(messages, 1)
    )


def _read_turn(message: Any, label: str) -> Turn:
    if not isinstance(message, dict):
        raise UserError(f'{label} is {short(message)}; write {{"role": "user", "content": "…"}}')
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts, the form of multimodal templates
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = None if None in parts else "".join(map(str, parts))
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{label} needs a role and a text as its content; images and tool calls are not read")
    return SPEAKERS.get(role, role), content


def render(turns: Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", label: str) -> str:
    """The turns rendered by the model's own template, up to where the assistant's next turn starts. If the
    template knows `enable_thinking`, thinking is off, so that the turn is the answer itself.

    Raises:
        UserError: the model has no template, or its template refuses the turns (a role it does not know).
    """
    messages = [{"role": role, "content": content} for role, content in turns]
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{label} is a chat, and the model's tokenizer has no chat template; use an instruct model, or "
            "plain texts"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        )
    except Exception as error:  # a template is a program, which may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{label}: the model's chat template refuses the messages ({reason}); check their roles and order"
        ) from None


def show(turns: Sequence[Turn]) -> str:
    """The turns for people: one per line, after its role."""
    return "\n".join(f"{role}: {content}" for role, content in turns)
