"""The cache of a call, under each of the names that the installed transformers accepts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from transformers import DynamicCache

import softhooks
from softhooks.compat.cache_argument import CACHE, NAMES, cache_in, cache_name, set_cache


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_found_under_each_name(name: str) -> None:
    cache = DynamicCache()
    assert cache_in({"input_ids": torch.ones(1, 2), "use_cache": True, name: cache}) is cache
    assert cache_in(dict.fromkeys(NAMES) | {name: cache}) is cache
    assert cache_in({name: None}) is None


@pytest.mark.parametrize("other", [{}, {"layer": torch.ones(1)}, object()], ids=["empty", "dictionary", "pages"])
def test_other_arguments_called_cache_are_not_caches(other: Any) -> None:
    assert cache_in({"cache": other}) is None


def test_a_cache_takes_the_place_of_the_one_that_is_there() -> None:
    old, new = DynamicCache(), DynamicCache()
    for name in NAMES:
        call = {"use_cache": True, name: old}
        set_cache(call, new, {"input_ids", CACHE})
        assert call == {"use_cache": True, CACHE: new}
    with pytest.raises(KeyError, match="no argument for a cache"):
        set_cache({}, new, {"input_ids", "use_cache"})


def test_the_name_is_that_of_the_forward() -> None:
    """Models with code of their own may keep the old name."""
    assert cache_name({"input_ids", "past_key_values"}) == "past_key_values"
    assert cache_name({"input_ids", CACHE}) == CACHE
    assert cache_name({"input_ids"}) is None


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE}))
@pytest.mark.parametrize(
    "method",
    [softhooks.PromptTuning(3), softhooks.PrefixTuning(3), softhooks.PromptTuning(3, placement="after_first")],
    ids=["prompt", "prefix", "slots"],
)
def test_a_loop_continues_a_cache_under_each_name(name: str, method: Any) -> None:
    """Since transformers 5.24, a caller may use the new name or the old one."""
    model = zoo.build("llama", "causal")
    softhooks.attach(model, method)
    ids = torch.randint(5, 50, (2, 7))
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :5], **{name: DynamicCache(config=model.config)})
        rest = model(ids[:, 5:], **{name: first[CACHE]})
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1)[:, -2:], whole[:, -2:], rtol=1e-4, atol=1e-4)
