"""The tables that `softhooks inspect` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from softhooks.cli.slot_table import show_slots, slot_facts
from softhooks.cli.visible import visible


def show(prompts: list[dict[str, Any]], console: Console) -> None:
    """Print the facts about each prompt and its tensors."""
    for one in prompts:
        by = "softhooks" if one["format"] == "softhooks" else "PEFT"
        kind = f"{one['class']}, {one['num_virtual_tokens']} virtual tokens, written by {by}"
        console.print(Text.assemble((visible(one["path"]), "bold"), f": {kind}"), soft_wrap=True)
        facts = Table.grid(padding=(0, 2, 0, 0))
        facts.add_column(style="cyan", no_wrap=True)
        facts.add_column(overflow="fold")
        for name, value in _facts(one):
            facts.add_row(f"  {name}", Text(visible(value)))
        console.print(facts, _tensors(one["tensors"]))
        show_slots(one, console)


def _tensors(tensors: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan")
    for title in ("  tensor", "shape", "numbers", "norms of rows"):
        table.add_column(title, overflow="fold")
    for one in tensors:
        norms = "none" if one["row_norms"] is None else " to ".join(f"{float(norm):.4g}" for norm in one["row_norms"])
        row = (f"  {one['name']}", " x ".join(map(str, one["shape"])), one["dtype"], norms)
        table.add_row(*(Text(visible(text)) for text in row))
    return table


def _facts(prompt: dict[str, Any]) -> list[tuple[str, str]]:
    base, parameters, live = prompt["base"], prompt["parameters"], prompt["live"]
    names = [base["class"] or base["task"] or "a model", base["name_or_path"] or "without a name"]
    known = [f"{key} {base[key]}" for key in ("revision", "digest") if base[key] is not None]
    sizes = [f"{key} {base[key]}" for key in ("width", "vocabulary") if base[key] is not None]
    sizes += ["sliding windows"] if base["slides"] else []
    facts = [
        ("method", prompt["method"]),
        ("options", _listed(prompt["options"])),
        ("conventions", _listed(prompt["conventions"])),
        ("base", ", ".join([*names, *sizes])),
        *([("", ", ".join(known))] if known else []),
        *[("", _stack(name, stack)) for name, stack in base["stacks"].items()],
        ("versions", ", ".join(f"{name} {version}" for name, version in prompt["versions"].items()) or "not known"),
        ("heads", ", ".join(prompt["heads"]) or "none"),
        ("parameters", f"{parameters['prompt']:,} in the prompt, {parameters['heads']:,} in heads"),
        ("file", f"{prompt['file']}, {prompt['bytes']:,} bytes"),
        ("live", "none" if live is None else _live(prompt["name"], live)),
        *slot_facts(prompt),
    ]
    if prompt["on_model"] is not None:
        share = parameters["prompt"] / max(prompt["on_model"]["model_parameters"], 1)
        facts.append(("on the model", f"enters as {prompt['on_model']['injection']}; {share:.4%} of its parameters"))
    origin = prompt["loaded_from"]
    if origin:
        facts.append(("loaded from", f"{origin['repo_id']} on the Hub, commit {origin['commit_hash']}"))
    trained = prompt["also_trained"]
    if trained:
        facts.append(
            ("not saved", f"{len(trained)} parameters of the base, trained with the prompt: {', '.join(trained)}")
        )
    return facts


def _live(name: str | None, live: dict[str, Any]) -> str:
    held = f"{live['file']}, {live['parameters']:,} numbers in {len(live['tensors'])} tensors, {live['bytes']:,} bytes"
    return held + (f"; trained as {name!r}" if name else "") + (f" by {live['optimizer']}" if live["optimizer"] else "")


def _listed(options: dict[str, Any]) -> str:
    shown = {name: repr(value) for name, value in options.items() if value is not None}
    return ", ".join(f"{name}={text if len(text) <= 72 else text[:72] + '...'}" for name, text in shown.items())


def _stack(name: str, stack: dict[str, Any]) -> str:
    causal = stack.get("causal")
    direction = "direction not known" if causal is None else "causal" if causal else "bidirectional"
    runs = [
        f"{role} attention in {layers} layers of {heads} heads, keys {keys}, values {values}"
        for role in ("self", "cross")
        for layers, heads, keys, values in stack.get(role, ())
    ]
    return "; ".join([f"{name}: {direction}", *runs])
