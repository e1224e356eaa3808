"""Load a base model together with a saved prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from softhooks.base_model.auto_classes import auto_class_of, require_class
from softhooks.base_model.cached_commits import REPOSITORY, cached_commits
from softhooks.compat.quiet import without_warnings
from softhooks.errors import CheckpointError, OptionError, PromptMismatchError
from softhooks.formats.find import find
from softhooks.formats.stored import StoredPrompt
from softhooks.load import attach_found

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOAD_YOURSELF = "Load the base model yourself, and then the prompt with `softhooks.load`."
_NEVER: dict[str, object] = {"trust_remote_code": False, "use_safetensors": True}


def load_model(
    path: str | Path,
    *,
    base: str | Path | None = None,
    name: str = "default",
    revision: str | None = None,
    token: str | bool | None = None,
    strict: bool = True,
    example: Mapping[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a saved prompt and its base model, and return the model with the prompt active.

    The prompt's file names the base model, its class and its revision on the Hub. The class is looked up in a fixed list of
    transformers' Auto classes. Only safetensors files are read, and no code from a repository is run.

    Args:
        path: a directory or Hub repository with a prompt, as in `load`.
        base: a directory or Hub repository to load the base model from, instead of the one that the file names.
        name: the name of the prompt on the model.
        revision: the revision of the prompt's Hub repository.
        token: the access token for both repositories.
        strict: refuse a base model that differs from the one that the prompt was trained with, as in `load`.
        example: a batch of the model's inputs, as in `attach`.
        options: options of `from_pretrained` for the base model, such as `dtype`, `device_map` and `quantization_config`.

    Raises:
        OptionError: `options` contains `trust_remote_code` or `use_safetensors`.
        CheckpointError: there is no prompt, or the base model is unknown, is not in the list or cannot be loaded.
        PromptMismatchError: the model is not the one that the prompt was trained with.
        AttachError: the prompt cannot be attached to the model.
    """
    refused = [key for key in _NEVER if key in options]
    if refused:
        raise OptionError(
            f"`load_model` does not accept {', '.join(f'`{key}`' for key in refused)}, because a file chooses the base model; "
            "it reads only safetensors files and runs no code from a repository.",
            _LOAD_YOURSELF,
        )
    stored = find(path, revision, token)
    model = _load_base(stored, _base_of(stored) if base is None else str(base), base is None, token, options)
    attach_found(model, stored, name, strict=strict, example=example)
    return model


def _base_of(stored: StoredPrompt) -> str:
    """Return the name or path of the base model; a prompt from the Hub may only name a repository."""
    given = stored.base.name_or_path
    is_name = REPOSITORY.fullmatch(given) is not None
    if is_name or (given and stored.loaded_from is None and Path(given).is_dir()):
        return given
    raise CheckpointError(
        "the prompt's file does not name a base model that can be loaded.",
        "Pass its name or its directory: `load_model(..., base=...)`.",
        base=repr(given[:200]) if given else "without a name",
        prompt=stored.source,
    )


def _load_base(
    stored: StoredPrompt, base: str, is_named_by_file: bool, token: str | bool | None, options: dict[str, Any]
) -> PreTrainedModel:
    import transformers

    auto = auto_class_of(stored.base.class_name, stored.base.task)
    if auto is None:
        raise CheckpointError(
            f"{stored.source}: none of transformers' Auto classes loads this prompt's base model.",
            _LOAD_YOURSELF,
            class_name=stored.base.class_name or "not known",
            task=stored.base.task or "not known",
        )
    cls: Any = getattr(transformers, auto.name)
    hub: dict[str, Any] = {"token": token, "trust_remote_code": False}
    revision = stored.base.revision if is_named_by_file else None
    if revision is not None and not Path(base).is_dir():
        hub["revision"] = revision
    labels = {} if (count := label_count(stored)) is None else {"num_labels": count}
    try:
        with without_warnings():
            config = transformers.AutoConfig.from_pretrained(base, **hub, **labels)
            require_class(auto, stored.base.class_name, config, stored.source)
            model: PreTrainedModel = cls.from_pretrained(base, config=config, use_safetensors=True, **hub, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            "the base model cannot be loaded.",
            f"Check the connection and the name, or pass `base=`. {_LOAD_YOURSELF}",
            base=base + (f", revision {revision}" if revision else ""),
            prompt=stored.source,
            error=f"{type(error).__name__}: {error}",
        ) from error
    if is_named_by_file:
        _require_commit(stored, model, base)
    return model


def _require_commit(stored: StoredPrompt, model: PreTrainedModel, base: str) -> None:
    """Check that the model's files come from the commit that the prompt's file names, if both are known."""
    wanted, found = stored.base.revision or "", _commits_of(model, base)
    if found and _COMMIT.fullmatch(wanted) and wanted not in found:
        raise PromptMismatchError(
            "the Hub returned another revision of the base model than the one that the prompt was trained with.",
            "Check the endpoint (`HF_ENDPOINT`) and the cache, or pass `base=`.",
            trained_with=stored.base,
            found=", ".join(found),
            prompt=stored.source,
        )


def _commits_of(model: PreTrainedModel, base: str) -> list[str]:
    recorded = getattr(model.config, "_commit_hash", None)  # older versions of transformers record it
    return [str(recorded)] if recorded else cached_commits(model, base)


def label_count(stored: StoredPrompt) -> int | None:
    """Return the number of labels, which is the number of rows of a stored head's last matrix; None without a head."""
    matrices = [value for head in stored.heads.values() for value in head.values() if value.dim() == 2]
    return matrices[-1].shape[0] if matrices else None
