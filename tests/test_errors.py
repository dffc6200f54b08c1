"""How messages show values: on one line, short, and without what large things hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastsae.errors import shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        (12_345, "12,345"),
        (-(10**400), "a number of about 401 digits"),
        (0.1, "0.1"),
        (float("nan"), "nan"),
        ("a\nb", r"'a\nb'"),
        ("\ud800é", r"'\ud800\xe9'"),
        ("é" * 200, f"'{'é' * 59}... (202 characters)"),
        ([[1] * 10**5], "a list"),
        ({"a": 1}, "an object"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), "a tensor bfloat16 [2, 3]"),
        (object(), "object"),
    ],
)
def test_values_in_messages(value: Any, text: str) -> None:
    assert shown(value) == text
