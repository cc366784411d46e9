"""Reading a section of params.yaml into a frozen dataclass: types and ranges checked, errors that name the key.

A wrong key, type or value is refused by its full name, with what was expected, what came and, for a misspelt key, what was
probably meant.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal


class ParamsError(ValueError):
    """A params entry is wrong; the message names the key, what was expected and what came."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number, the ends included unless `open_low`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies inside."""
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"a number above {self.low:g}" if self.open_low else f"a number at least {self.low:g}"
        return f"a number between {self.low:g}{' (not included)' if self.open_low else ''} and {self.high:g}"


class Plain:
    """Text that is safe as the name of a folder, of a stage and of a model in MLflow: it means nothing to a shell."""

    def holds(self, value: str) -> bool:
        """Whether a text is such a name."""
        return re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]*", value) is not None

    def __str__(self) -> str:
        return "a name of letters, digits, '_', '-' and '.', the first a letter or digit"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Name = Annotated[str, Plain()]


def read(kind: Any, value: Any, key: str) -> Any:
    """Turn a plain value into `kind`, or say which key is wrong."""
    if dataclasses.is_dataclass(kind):
        return _read_section(kind, value, key)
    origin = typing.get_origin(kind)
    if origin is Annotated:
        base, bounds = typing.get_args(kind)
        found = read(base, value, key)
        if not bounds.holds(found):
            raise ParamsError(f"{key}: expected {bounds}, got {value!r}")
        return found
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ParamsError(f"{key}: expected one of {', '.join(map(str, choices))}; got {value!r}{_suggest(value, choices)}")
        return value
    if origin in (types.UnionType, typing.Union):
        (inner,) = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        return None if value is None else read(inner, value, key)
    if origin is list:
        _expect(isinstance(value, list), key, "a list", value)
        return [read(typing.get_args(kind)[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _expect(isinstance(value, dict), key, "a mapping", value)
        return {str(name): read(typing.get_args(kind)[1], item, f"{key}.{name}") for name, item in value.items()}
    return _read_scalar(kind, value, key)


def _read_section(kind: Any, value: Any, key: str) -> Any:
    _expect(isinstance(value, dict), key, "a mapping", value)
    hints = typing.get_type_hints(kind, include_extras=True)
    prefix = "" if key == "params.yaml" else f"{key}."
    for name in value:
        if name not in hints:
            meant = _suggest(name, hints) or f"; it has {', '.join(hints)}"
            raise ParamsError(f"{prefix}{name}: no such entry in {key}{meant}")
    for name in hints:
        if name not in value:
            raise ParamsError(f"{prefix}{name}: missing from {key}")
    return kind(**{name: read(hint, value[name], f"{prefix}{name}") for name, hint in hints.items()})


def _read_scalar(kind: type, value: Any, key: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    _expect(type(value) is kind and not (isinstance(value, float) and not math.isfinite(value)), key, words, value)
    return value


def _expect(fine: bool, key: str, wanted: str, value: Any) -> None:
    if not fine:
        hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) and "number" in wanted else ""
        raise ParamsError(f"{key}: expected {wanted}, got {type(value).__name__} {value!r}{hint}")


def _suggest(name: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(name), [str(choice) for choice in known], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
