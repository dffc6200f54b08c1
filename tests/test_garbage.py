"""Imports and loading are not interrupted by searches for garbage, which go on after them."""

from __future__ import annotations

import contextlib
import gc

import pytest

from fastsae.garbage import not_searched


@pytest.mark.parametrize("is_enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_searches_go_on_as_before(is_enabled: bool, fails: bool) -> None:
    was_enabled = gc.isenabled()
    (gc.enable if is_enabled else gc.disable)()
    try:
        with contextlib.suppress(OSError), not_searched():
            assert not gc.isenabled()
            if fails:
                raise OSError
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_a_decorated_function_is_undisturbed() -> None:
    assert not not_searched()(gc.isenabled)()
    assert gc.isenabled()
