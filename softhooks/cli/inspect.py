"""`softhooks inspect`: what a stored prompt is, told from its files alone, without a model.

The files are read by what `softhooks.load` reads them with, so what it would refuse is refused here, in the same words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from softhooks.errors import format_message

if TYPE_CHECKING:
    from torch import Tensor

    from softhooks.formats.stored import StoredPrompt
    from softhooks.method import Method


def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH", help="Folders of saved prompts: of save_pretrained, of a Trainer, or of PEFT."),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON list, with an object for each PATH, for scripts.")
    ] = False,
) -> None:
    """Tell what a saved prompt is: its method, its base model, its tensors. No model is needed.

    Read are JSON and safetensors, never a pickle, and every check that [bold]softhooks.load[/] makes before it has a
    model is made: what inspect shows is whole and sound in itself. Whether it fits a model, loading tells.

    [bold]norms of rows[/] are the smallest and the largest Euclidean norm of a tensor's rows; a row is a virtual token
    in most methods. Rows far longer than the words' embeddings have run away.

    [bold]live[/] are the parameters beside the folded prompt (the MLP of a prefix, a head, what else trains) from which
    a Trainer's checkpoint resumes. Of PEFT's, method and options are those that softhooks.load makes of it.

    All paths are read before anything is printed. Exit status: 0; 1 if a file is truncated, foreign or hostile; 2 if
    there is no prompt at a PATH.

    [bold]Examples[/]

      softhooks inspect sst2-prompt

      softhooks inspect runs/checkpoint-500 runs/checkpoint-1000

      softhooks inspect my-peft-adapter --json | jq '.[0].options'
    """
    for path in paths:
        problem = _problem(path)
        if problem is not None:
            Console(stderr=True).print(visible(problem, "\n"), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2)
    told = [about(path) for path in paths]
    if as_json:
        typer.echo(json.dumps(told, indent=2, allow_nan=False))
        return
    if sys.stdout.isatty():
        show(told, Console())
        return
    plain = Console(width=100_000, force_terminal=False)  # in a pipe no line is broken
    with plain.capture() as printed:
        show(told, plain)
    typer.echo("\n".join(line.rstrip() for line in printed.get().splitlines()))


def visible(text: str, kept: str = "") -> str:
    """Spell out what a terminal would obey and not show, such as escape sequences and ends of lines."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


# --- where ------------------------------------------------------------------------------------------------------------


def _problem(path: Path) -> str | None:
    """What keeps a path from being the directory of a prompt; None: nothing does."""
    from softhooks.formats import peft_read
    from softhooks.formats.native import TENSORS

    marks = (TENSORS, peft_read.CONFIG)
    try:
        if path.is_dir():
            if any((path / mark).is_file() for mark in marks):
                return None
            inside = sorted(str(e) for e in path.iterdir() if any((e / mark).is_file() for mark in marks))
            found = "no prompt; " + (f"there are some in {', '.join(inside)}" if inside else "there is none inside")
        else:
            found = "a file" if path.exists() else "nothing"
    except OSError as error:  # a name too long for any file, a directory that may not be read
        found = str(error)
    return format_message(
        "`softhooks inspect` takes the directory of a saved prompt.",
        "Give the directory that `save_pretrained`, a Trainer or PEFT wrote; the hub is not asked.",
        path=path,
        expected=f"a directory with {' or '.join(marks)}",
        found=found,
    )


# --- what it is -------------------------------------------------------------------------------------------------------


def about(folder: Path) -> dict[str, Any]:
    """Tell everything about a stored prompt, as JSON can hold it; a number that JSON lacks is a text, `"Infinity"`.

    Raises:
        CheckpointError: a file is truncated, foreign or hostile.
    """
    from softhooks.formats import peft_read
    from softhooks.formats.files import parse_json, read_json, read_tensors
    from softhooks.formats.find import read
    from softhooks.formats.native import FORMAT, TENSORS
    from softhooks.methods.stored_options import method_of

    stored = read(folder)
    method = method_of(stored)
    own = (folder / TENSORS).is_file()
    file = folder / (TENSORS if own else peft_read.TENSORS)
    tensors, metadata = read_tensors(file)
    description = parse_json(metadata.get(FORMAT, ""), str(file)) if own else read_json(folder / peft_read.CONFIG)
    versions = description.get("versions") if own else {"peft": description.get("peft_version")}
    versions = versions if isinstance(versions, dict) else {}
    held = sum(tensor.numel() for head in stored.heads.values() for tensor in head.values())
    live = _live(folder)
    told = {
        "path": str(folder),
        "format": "softhooks" if own else "peft",
        "name": live and live.pop("name"),
        "method": stored.kind,
        "class": type(method).__name__,
        "num_virtual_tokens": method.num_virtual_tokens,
        "options": _options(stored, method),
        "conventions": stored.conventions,
        "base": _base(stored),
        "versions": {key: value for key, value in versions.items() if isinstance(value, str)},
        "heads": list(stored.heads),
        "also_trained": stored.also_trained,
        "parameters": {"prompt": sum(tensor.numel() for tensor in tensors.values()) - held, "heads": held},
        "file": file.name,
        "bytes": file.stat().st_size,
        "tensors": [_tensor(name, tensor) for name, tensor in sorted(tensors.items())],
        "live": live,
    }
    plain: dict[str, Any] = json.loads(json.dumps(told), parse_constant=str)
    return plain


def _options(stored: StoredPrompt, method: Method) -> dict[str, Any]:
    """The options; those that only say where the prompt started are not taken up when it is read, but told here."""
    options = {key: value for key, value in method.options().items() if key not in method.start_options}
    given = stored.options
    return options | {key: given[key] for key in method.start_options if key in given and _is_flat(given[key])}


def _is_flat(value: object) -> bool:
    """Whether an option that nobody has checked is of the kinds that are written."""
    parts = value if isinstance(value, list) else [value]
    return all(part is None or isinstance(part, (bool, int, float, str)) for part in parts)


def _base(stored: StoredPrompt) -> dict[str, Any]:
    """What is known of the base model; None where it is not."""
    base = stored.base
    return {
        "class": base.class_name or None,
        "task": base.task or None,
        "name_or_path": base.name_or_path or None,
        "revision": base.revision,
        "digest": base.fingerprint and base.fingerprint.digest,
        "width": base.width,
        "vocabulary": base.vocabulary,
        "slides": base.sliding_window,
        "stacks": stored.stacks,
    }


def _tensor(name: str, tensor: Tensor) -> dict[str, Any]:
    """A tensor, and the norms of its rows; a vector is one row, and one without numbers has no norm."""
    import torch

    numbers = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # few operations take 8 bits
    rows = numbers.reshape(-1, numbers.shape[-1]) if tensor.numel() and tensor.dim() else numbers.reshape(1, -1)
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64) if tensor.numel() else None
    return {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "row_norms": None if norms is None else [float(norms.min()), float(norms.max())],
    }


def _live(folder: Path) -> dict[str, Any] | None:
    """The live parameters beside a prompt, and the name under which it was trained.

    Raises:
        CheckpointError: their file is truncated or foreign.
    """
    import torch

    from softhooks.backbone.container import CONTAINER, is_prompt_key
    from softhooks.formats.files import parse_json, read_tensors
    from softhooks.saving.state_dict import LIVE

    path = folder / LIVE
    if not path.is_file():
        return None
    tensors, _ = read_tensors(path)
    name, optimizer = None, None
    for key in [key for key in tensors if is_prompt_key(key) and key.endswith(".description")]:
        if tensors[key].dtype is torch.uint8 and tensors[key].dim() == 1:
            name = key[len(CONTAINER) + 1 : -len(".description")]
            optimizer = parse_json(bytes(tensors.pop(key).tolist()), str(path)).get("optimizer")
    return {
        "name": name,
        "file": LIVE,
        "bytes": path.stat().st_size,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "optimizer": optimizer if isinstance(optimizer, str) else None,
        "tensors": {key: list(tensor.shape) for key, tensor in sorted(tensors.items())},
    }


# --- how it is shown --------------------------------------------------------------------------------------------------


def show(told: list[dict[str, Any]], console: Console) -> None:
    """Print what `about` told of each prompt: a line that names it, what it is, and its tensors."""
    for one in told:
        by = "softhooks" if one["format"] == "softhooks" else "PEFT"
        kind = f"{one['class']}, {one['num_virtual_tokens']} virtual tokens, written by {by}"
        console.print(Text.assemble((visible(one["path"]), "bold"), f": {kind}"), soft_wrap=True)
        facts = Table.grid(padding=(0, 2, 0, 0))
        facts.add_column(style="cyan", no_wrap=True)
        facts.add_column(overflow="fold")
        for name, value in _facts(one):
            facts.add_row(f"  {name}", Text(visible(value)))
        console.print(facts, _tensors(one["tensors"]))


def _tensors(tensors: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="cyan")
    for title in ("  tensor", "shape", "numbers", "norms of rows"):
        table.add_column(title, overflow="fold")
    for one in tensors:
        norms = "none" if one["row_norms"] is None else " to ".join(f"{float(norm):.4g}" for norm in one["row_norms"])
        row = (f"  {one['name']}", " x ".join(map(str, one["shape"])), one["dtype"], norms)
        table.add_row(*(Text(visible(text)) for text in row))
    return table


def _facts(told: dict[str, Any]) -> list[tuple[str, str]]:
    base, parameters, live = told["base"], told["parameters"], told["live"]
    names = [base["class"] or base["task"] or "a model", base["name_or_path"] or "without a name"]
    known = [f"{key} {base[key]}" for key in ("revision", "digest") if base[key] is not None]
    sizes = [f"{key} {base[key]}" for key in ("width", "vocabulary") if base[key] is not None]
    sizes += ["sliding windows"] if base["slides"] else []
    facts = [
        ("method", told["method"]),
        ("options", _listed(told["options"])),
        ("conventions", _listed(told["conventions"])),
        ("base", ", ".join([*names, *sizes])),
        *([("", ", ".join(known))] if known else []),
        *[("", _stack(name, stack)) for name, stack in base["stacks"].items()],
        ("versions", ", ".join(f"{name} {version}" for name, version in told["versions"].items()) or "not told"),
        ("heads", ", ".join(told["heads"]) or "none"),
        ("parameters", f"{parameters['prompt']:,} in the prompt, {parameters['heads']:,} in heads"),
        ("file", f"{told['file']}, {told['bytes']:,} bytes"),
        ("live", "none" if live is None else _in_words(told["name"], live)),
    ]
    trained = told["also_trained"]
    if trained:
        facts.append(("not in it", f"{len(trained)} parameters of the base trained beside it: {', '.join(trained)}"))
    return facts


def _in_words(name: str | None, live: dict[str, Any]) -> str:
    held = f"{live['file']}, {live['parameters']:,} numbers in {len(live['tensors'])} tensors, {live['bytes']:,} bytes"
    return held + (f"; trained as {name!r}" if name else "") + (f" by {live['optimizer']}" if live["optimizer"] else "")


def _listed(options: dict[str, Any]) -> str:
    shown = {name: repr(value) for name, value in options.items() if value is not None}
    return ", ".join(f"{name}={text if len(text) <= 72 else text[:72] + '...'}" for name, text in shown.items())


def _stack(name: str, stack: dict[str, Any]) -> str:
    causal = stack.get("causal")
    direction = "direction not told" if causal is None else "causal" if causal else "bidirectional"
    runs = [
        f"{role} attention in {layers} layers of {heads} heads, keys {keys}, values {values}"
        for role in ("self", "cross")
        for layers, heads, keys, values in stack.get(role, ())
    ]
    return "; ".join([f"{name}: {direction}", *runs])
