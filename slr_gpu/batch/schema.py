"""Tables of a TOML file, checked: known keys, right types, and every mistake gathered.

In: tables, and what their keys should be. Out: what is right of them, and `Errors` of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from ..errors import InputError, SLRError, complain

_WORDS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a table",
    list: "a list",
    list[str]: "a list of strings",
}


class Errors:
    """Messages gathered instead of raised."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, where: str, got: object, expected: str, remedy: str) -> None:
        self.messages.append(f"{where}: {complain(got, expected, remedy)}")

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Gather what the package's own checks raise."""
        try:
            yield
        except SLRError as error:
            self.messages.append(f"{where}: {error}")

    def typed(self, where: str, table: Any, types: dict[str, Any], required: tuple = ()) -> dict:
        """The entries of a table that are known and of the right type."""
        if not isinstance(table, dict):
            self.add(where, repr(table), "a table", "Write [[...]] and its keys below.")
            return {}
        good = {}
        for key, value in table.items():
            if key not in types:
                self.add(where, f"the key {key!r}", f"one of {', '.join(types)}", "Check it.")
                continue
            wanted = types[key] if isinstance(types[key], tuple) else (types[key],)
            if any(is_of(value, kind) for kind in wanted):
                good[key] = value
            else:
                words = " or ".join(_WORDS[kind] for kind in wanted)
                self.add(where, f"{key} = {value!r}", words, "Check the type.")
        for key in required:
            if key not in table:
                self.add(where, f"no {key}", f"{key} = {_WORDS[types[key]]}", "Add it.")
        return good


def is_of(value: Any, kind: type) -> bool:
    """Whether a value is of a kind that `_WORDS` knows; true is no number, but 1 is a float."""
    if isinstance(value, bool):
        return kind is bool
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, (int, float) if kind is float else kind)


def of_table(kind: type, table: dict) -> Any:
    """A dataclass from its fields by name, each of the type of its default."""
    known = {f.name: f.default for f in fields(kind) if f.name != "cache"}
    values = {}
    for name, value in table.items():
        if name not in known:
            raise InputError(complain(name, f"one of {', '.join(known)}", "Check the name."))
        value = tuple(value) if isinstance(value, list) else value
        wanted = type(known[name])
        if known[name] is not None and not is_of(value, wanted):
            words = _WORDS.get(wanted, "a list")
            raise InputError(complain(f"{name} = {value!r}", words, "Check the type."))
        values[name] = value
    return kind(**values)
