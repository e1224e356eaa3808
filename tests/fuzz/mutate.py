"""Change a JSON text at random places; bytes that a fuzzer changes blindly are rarely JSON."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 2**31 - 1, 2**31, 2**63, 10**12, 10**30, 10**400, -(10**12), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "a", "text", "0", "\x00", "\x1b[31m", "\ud800", "../../etc", "a" * 5000, [], {}, [[]], [0],
    [1, 2], ["a"], {"a": 1}, [None], [True], [1.5], [2**40, 0], ["F16", 4, 32], ["I64", 4, 32], "{soft:3} {text}",
    "{soft:99999999}",
)  # fmt: skip
"""Values that a reader may not expect."""


def mutate_json(data: bytes, seed: int, max_size: int) -> bytes | None:
    """Return a JSON text in which one to three values have changed, or None if `data` is not JSON or the result is too long."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    draw = random.Random(seed)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        value = _mutated(value, draw)
    try:
        text = json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None
    return text if len(text) <= max_size else None


def _mutated(value: Any, draw: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return draw.choice(VALUES)
    holder, key = draw.choice(places)
    action = draw.random()
    if action < 0.5:
        holder[key] = copy.deepcopy(draw.choice(VALUES))
    elif action < 0.65:
        del holder[key]
    elif action < 0.75 and type(holder[key]) is int:
        holder[key] += draw.choice((-1, 1, 2, -2 * holder[key]))
    elif action < 0.9:  # a value from another place
        other, at = draw.choice(places)
        holder[key] = copy.deepcopy(other[at])
    elif isinstance(holder, list):
        holder.insert(draw.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    else:
        holder[draw.choice((*holder, "a", "text", "layers", "lengths"))] = copy.deepcopy(holder[key])
    return value


def _places(value: Any) -> Any:
    """Yield each list or object in a value with each of its keys."""
    stack = [value]
    while stack:
        holder = stack.pop()
        keys = range(len(holder)) if isinstance(holder, list) else holder if isinstance(holder, dict) else ()
        for key in keys:
            yield holder, key
            stack.append(holder[key])
