"""`Strict`, the base class of a recipe's sections, which refuses unknown keys; and `parse`, whose errors name
the key, and for an unknown one the nearest known one."""

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


def validate_with(require: Callable[[Any], object]) -> AfterValidator:
    """For Annotated: the value stays as it is, and `require` raises if it is invalid."""

    def check(value: Any) -> Any:
        require(value)
        return value

    return AfterValidator(check)


def parse_typed(kind: type[Kind], value: object) -> Kind:
    """A value from a file, converted to the type that it should have. Raises ValueError if it does not
    fit."""
    return TypeAdapter(kind).validate_python(value)


def parse(schema: type[Section], content: object, section: str) -> Section:
    """`content` as a `schema`. Raises UserError with a line that names the key and its allowed values."""
    if not isinstance(content, Mapping):
        raise UserError(f"{section} must contain settings (key: value), not {short(content)}")
    try:
        return schema.model_validate(dict(content))
    except ValidationError as error:
        raise _explain(schema, error, section) from None


def _explain(schema: type[Strict], error: ValidationError, section: str) -> UserError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # our own validators name the key themselves
        return cause
    path = [str(part) for part in first["loc"]]
    key = ".".join([section, *path]) if section else ".".join(path)
    if first["type"] == "extra_forbidden":
        known_keys = _keys(schema, path[:-1])
        return unknown(
            f"key in {'.'.join([section, *path[:-1]]).strip('.') or 'the recipe'}:", path[-1], known_keys
        )
    if first["type"] == "missing":
        return UserError(f"{key} is missing; add it")
    message = first["msg"].removeprefix("Value error, ")
    value = first.get("input")
    return UserError(
        f"{key or 'the recipe'}: {message}"
        if isinstance(value, Mapping)
        else f"{key} is {short(value)}: {message[:1].lower()}{message[1:]}"
    )


def short(value: object) -> str:
    """A value for a message, shortened if it is large."""
    return reprlib.repr(value)


def _keys(schema: Any, path: list[str]) -> list[str]:
    """The known keys of a nested section, found by following `path` through the fields."""
    for part in path:
        fields = getattr(schema, "model_fields", {})
        annotation = fields[part].annotation if part in fields else schema
        schemas = [
            kind
            for kind in [annotation, *_arguments(annotation)]
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        schema = schemas[0] if schemas else schema
    return list(getattr(schema, "model_fields", {}))


def _arguments(annotation: Any) -> list[Any]:
    inner = list(getattr(annotation, "__args__", ()))
    return inner + [nested for argument in inner for nested in _arguments(argument)]
