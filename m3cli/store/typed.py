"""Dataclasses built from JSON by their type hints: each member is checked once, where it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import orjson

from m3cli.errors import DamageFound
from m3cli.records import Between

T = TypeVar("T")
_WORDS = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}
_SHOWN = 60


class _Mismatch(Exception):
    """A value that is not what its type hint asks for, with the path to it."""

    def __init__(self, words: str, path: tuple[str, ...] = ()) -> None:
        super().__init__(words)
        self.words = words
        self.path = path


def parse_record(kind: type[T], value: object, *, name: str) -> T:
    """Build a dataclass from a JSON value.

    Covered are dataclasses in dataclasses, tuple[X, ...], dict[str, X], X | None, Literal, str, bool, int, float, and
    numbers annotated with Between. A boolean is no integer. All members must be there, defaults or not, and no others.

    Args:
        kind: the dataclass.
        value: what `orjson.loads` returned.
        name: of the file, for the message.

    Raises:
        DamageFound: the value is something else; the message names the member.
    """
    try:
        record: T = _parser_of(cast("Any", kind))(value)
    except _Mismatch as mismatch:
        member = ".".join(mismatch.path).replace(".[", "[") or "the document"
        raise DamageFound(f"{name} is not what m3 writes: {member} {mismatch.words}") from mismatch
    return record


@cache
def _parser_of(hint: Any) -> Callable[[Any], Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _parse_members_of(hint)
    if origin is Annotated:
        return _parse_between(arguments[0], arguments[1])
    if origin in (Union, UnionType):
        return _parse_optional(*(argument for argument in arguments if argument is not NoneType))
    if origin is Literal:
        return _parse_literal(arguments)
    if origin in (tuple, dict):
        return _parse_items(arguments[0]) if origin is tuple else _parse_values(arguments[1])
    return _parse_plain(hint)


def _parse_members_of(kind: Any) -> Callable[[Any], Any]:
    parsers = {name: _parser_of(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}

    def parse(value: Any) -> Any:
        if type(value) is not dict:
            raise _mismatch(value, "an object")
        if value.keys() != parsers.keys():
            missing = [name for name in parsers if name not in value]
            name = missing[0] if missing else next(name for name in value if name not in parsers)
            raise _Mismatch("is missing" if missing else "is a member that this m3 does not know", (name,))
        return kind(**{name: _descend(parsers[name], value[name], name) for name in parsers})

    return parse


def _parse_items(hint: Any) -> Callable[[Any], Any]:
    parser = _parser_of(hint)

    def parse(value: Any) -> Any:
        if type(value) is not list:
            raise _mismatch(value, "a list")
        return tuple([_descend(parser, item, f"[{index}]") for index, item in enumerate(value)])

    return parse


def _parse_values(hint: Any) -> Callable[[Any], Any]:
    parser = _parser_of(hint)

    def parse(value: Any) -> Any:
        if type(value) is not dict:
            raise _mismatch(value, "an object")
        return {name: _descend(parser, item, name) for name, item in value.items()}

    return parse


def _parse_optional(hint: Any) -> Callable[[Any], Any]:
    parser = _parser_of(hint)

    def parse(value: Any) -> Any:
        return None if value is None else parser(value)

    return parse


def _parse_literal(choices: tuple[Any, ...]) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        if type(value) is not str or value not in choices:
            raise _mismatch(value, f"one of {', '.join(map(str, choices))}")
        return value

    return parse


def _parse_between(hint: Any, bounds: Between) -> Callable[[Any], Any]:
    parser = _parser_of(hint)

    def parse(value: Any) -> Any:
        if not bounds.least <= parser(value) <= bounds.most:
            raise _mismatch(value, f"a number from {bounds.least} to {bounds.most}")
        return value

    return parse


def _parse_plain(hint: Any) -> Callable[[Any], Any]:
    kinds = (int, float) if hint is float else (hint,)

    def parse(value: Any) -> Any:
        if type(value) not in kinds:
            raise _mismatch(value, _WORDS[hint])
        return value

    return parse


def _descend(parser: Callable[[Any], Any], value: Any, name: str) -> Any:
    try:
        return parser(value)
    except _Mismatch as mismatch:
        raise _Mismatch(mismatch.words, (name, *mismatch.path)) from None


def _mismatch(value: object, expected: str) -> _Mismatch:
    found = orjson.dumps(value).decode()
    return _Mismatch(f"is {found if len(found) <= _SHOWN else found[:_SHOWN] + '...'}, expected {expected}")
