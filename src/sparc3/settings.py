"""`Strict`, the base class of a recipe's sections, which refuses unknown keys; and `parse`, whose errors name
the key. The message about an unknown key, with the nearest known one, is made in `_explain`."""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

from .errors import UserError, unknown


class Strict(BaseModel):
    """A section of a recipe. Unknown keys are refused; values keep the type they have."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Section = TypeVar("Section", bound=Strict)
Kind = TypeVar("Kind")


def checked_by(require: Callable[[Any], object]) -> AfterValidator:
    """For Annotated: the value stays as it is, and `require` raises where it may not stand there."""

    def check(value: Any) -> Any:
        require(value)
        return value

    return AfterValidator(check)


def typed(kind: type[Kind], value: object) -> Kind:
    """A value out of a file as the type it should have. Raises ValueError where it does not."""
    return TypeAdapter(kind).validate_python(value)


def parse(schema: type[Section], content: object, where: str) -> Section:
    """`content` as a `schema`. Raises UserError, one line, naming the key and what it should be."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where} must contain settings (key: value), not {short(content)}")
    try:
        return schema.model_validate(dict(content))
    except ValidationError as error:
        raise _explain(schema, error, where) from None


def _explain(schema: type[Strict], error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # a validator of ours has said it all
        return cause
    path = [str(part) for part in first["loc"]]
    place = ".".join([where, *path]) if where else ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _keys(schema, path[:-1])
        return unknown(f"key in {'.'.join([where, *path[:-1]]).strip('.') or 'the recipe'}:", path[-1], known)
    if first["type"] == "missing":
        return UserError(f"{place} is missing; add it")
    said = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    return UserError(
        f"{place or 'the recipe'}: {said}"
        if isinstance(given, Mapping)
        else f"{place} is {short(given)}: {said[:1].lower()}{said[1:]}"
    )


def short(value: object) -> str:
    """A value as a message shows it, whatever its size."""
    return reprlib.repr(value)


def _keys(schema: Any, path: list[str]) -> list[str]:
    """The keys a nested section knows, following `path` through the fields."""
    for part in path:
        fields = getattr(schema, "model_fields", {})
        annotation = fields[part].annotation if part in fields else schema
        found = [
            kind
            for kind in [annotation, *_arguments(annotation)]
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        schema = found[0] if found else schema
    return list(getattr(schema, "model_fields", {}))


def _arguments(annotation: Any) -> list[Any]:
    inner = list(getattr(annotation, "__args__", ()))
    return inner + [deeper for argument in inner for deeper in _arguments(argument)]
