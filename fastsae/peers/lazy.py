"""Attributes that may hold a function in the place of a value, which it makes when somebody reads it."""

from __future__ import annotations

from typing import Any


class Lazy:
    """A field of a class that may be set to a function without arguments; the first read calls it and keeps the result."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, obj: Any, value: Any) -> None:
        obj.__dict__[self.name] = value

    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        if obj is None:
            return self
        value = obj.__dict__[self.name]
        if callable(value):
            value = obj.__dict__[self.name] = value()
        return value
