"""Checked numbers: one frozen dataclass per section is the only place of names, defaults and checks.

YAML, Python and Tune all pass through ``check``, so they meet the same sentences.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from rayft.imports import nearest

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):  # YAML reads yes, no, on and off as these, and Python counts with them
        raise PydanticCustomError("number", "a number")
    return value


NUMBER = BeforeValidator(_no_switch)
Positive = Annotated[float, NUMBER, Field(gt=0)]
NonNegative = Annotated[float, NUMBER, Field(ge=0)]
Share = Annotated[float, NUMBER, Field(ge=0, lt=1)]
ShareOrAll = Annotated[float, NUMBER, Field(ge=0, le=1)]
Count = Annotated[int, NUMBER, Field(ge=1)]
CountOrZero = Annotated[int, NUMBER, Field(ge=0)]

T = TypeVar("T")


def check(section: str, cls: type[T], values: Mapping[str, Any]) -> T:
    """``cls(**values)`` after coercion, or a ``ValueError`` of one sentence: key, what was given, what is allowed."""
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ValueError(f"{section} has no key {key!r}{nearest(key, names)}; it has {', '.join(names)}")
    try:
        return _adapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ValueError(sentence(section, error)) from None


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    """Made once for each section: that takes milliseconds, and sections are read in every iteration."""
    return TypeAdapter(cls)


def sentence(section: str, error: ValidationError) -> str:
    """The first of pydantic's complaints as one sentence."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in (section, *first["loc"]) if part != "")
    if first["type"] == "value_error":
        return f"{key}: {first.get('ctx', {}).get('error', first['msg'])}"
    if first["type"] == "missing":
        return f"{key} is missing; it has no default"
    given = first.get("input")
    allowed = first["msg"].removeprefix("Input ").removeprefix("should be ")
    return f"{key} is {given!r}; it should be {allowed}"


def defaults(cls: type) -> dict[str, Any]:
    """Field name -> default."""
    return {f.name: f.default for f in dataclasses.fields(cls)}


def explain(cls: type) -> dict[str, str]:
    """Field name -> the sentence written under it, base classes included."""
    said: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if named and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                said[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[union-attr]
    return said
