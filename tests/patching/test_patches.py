"""Patched attributes, entries, functions and hooks are restored, and what other code has set since stays."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from softhooks.patching.patches import Patches, patched
from softhooks.patching.shared_patches import SharedPatches


class _Base:
    def run(self) -> str:
        return "original"


class _Derived(_Base):
    pass


def _loud(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def run(*args: Any) -> str:
        return original(*args).upper()

    return run


def test_everything_is_put_back_in_reverse_order() -> None:
    module, entries = nn.Linear(1, 1), {"there": 1}
    before = dict(vars(module))
    with Patches() as patches:
        patches.set(module, "forward", 1)
        patches.set(module, "forward", 2)
        patches.delete(module, "training")
        patches.set(entries, "there", 2)
        patches.set(entries, "new", 3)
        patches.keep(module.register_forward_hook(lambda *_: None))
        assert vars(module)["forward"] == 2
        assert "training" not in vars(module)
        assert entries == {"there": 2, "new": 3}
        assert set(patches.values()) >= {1, 2, 3}
    assert vars(module) == before
    assert entries == {"there": 1}
    assert not patches
    assert not module._forward_hooks


def test_an_inherited_method_is_inherited_again() -> None:
    patches = Patches()
    for _ in range(2):
        patches.wrap(_Derived, "run", _loud)
    assert _Derived().run() == "ORIGINAL"
    assert _Base().run() == "original"
    patches.undo()
    assert "run" not in vars(_Derived)
    assert _Derived().run() == "original"


def test_what_other_code_has_set_stays_and_is_not_wrapped_again() -> None:
    patches, owner = Patches(), _Derived()
    patches.wrap(owner, "run", _loud)
    others = vars(owner)["run"] = functools.partial(vars(owner)["run"])
    patches.undo()
    patches.wrap(owner, "run", _loud)
    assert vars(owner)["run"] is others
    assert len(patches.values()) == 1


def test_the_last_patch_of_one_attribute_is_undone_alone() -> None:
    patches, module = Patches(), nn.Linear(1, 1)
    for value in ("first", "second"):
        patches.set(module, "mark", value)
    patches.restore(module, "mark")
    assert vars(module)["mark"] == "first"
    patches.restore(module, "other")
    patches.restore(module, "mark")
    assert "mark" not in vars(module)
    assert not patches


def test_a_copy_has_patches_of_its_own() -> None:
    module = nn.Linear(1, 1)
    module.patches = Patches()
    module.patches.set(module, "mark", [])
    other = copy.deepcopy(module)
    other.patches.undo()
    assert "mark" in vars(module)
    assert "mark" not in vars(other)


def test_a_block_puts_back_after_an_error() -> None:
    entries = {"there": 1}
    with pytest.raises(ValueError, match="inside"), patched(entries, "there", 2):
        raise ValueError("inside")
    assert entries == {"there": 1}


@pytest.mark.parametrize("goes", ["discarded", "collected"])
def test_shared_patches_last_as_long_as_a_user(goes: str) -> None:
    shared: SharedPatches[_Base] = SharedPatches(lambda patches, owner: patches.wrap(owner, "run", _loud))
    users, owner = [_Base(), _Base()], _Base()
    for user in users:
        shared.add(user, owner)
    shared.discard(users.pop(0))
    gc.collect()
    assert list(shared) == users
    assert owner.run() == "ORIGINAL"
    if goes == "discarded":
        shared.discard(user)
    del users, user
    gc.collect()
    assert not shared
    assert "run" not in vars(owner)
