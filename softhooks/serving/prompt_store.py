"""A folder with the prompts of one base model: list, tag, load and remove them by name.

Each subfolder with a saved prompt is an entry, and its name is the prompt's name. Therefore, `prompt.save_pretrained("store/en")`
adds a prompt too, and a store needs no index that could disagree with its files.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import nn

from softhooks.checks.attach_arguments import NAME_RULE, is_prompt_name
from softhooks.compat.sharding import gathered
from softhooks.errors import CheckpointError, NameTakenError, NotAttachedError, OptionError
from softhooks.formats import softhooks_files
from softhooks.formats.find import find, find_on_hub, format_of, read
from softhooks.formats.hub_collection import repositories_of
from softhooks.formats.stored import StoredPrompt
from softhooks.load import load
from softhooks.prompt import SoftPrompt
from softhooks.serving.one_base import require_fingerprint, require_same_base
from softhooks.serving.tags import FILE as TAGS
from softhooks.serving.tags import checked_tags, read_tags, write_tags

_MAX_NAME = 128  # characters
_RULE = f"at most {_MAX_NAME} characters, {NAME_RULE}"
_OWN_FILES = (softhooks_files.TENSORS, softhooks_files.DESCRIPTION, softhooks_files.LIVE, TAGS)
"""The files that `remove` deletes; without the first one, a folder is no entry."""


class PromptStore:
    """A folder with the prompts of one base model, each in a subfolder with its name.

    Several processes may use a store at the same time. Every file is written under a temporary name and then renamed, so a
    reader finds either the old prompt or the new one.

    Args:
        folder: the folder; `add` creates it.

    Raises:
        OptionError: `folder` is a file, or a saved prompt.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.is_file() or format_of(self.folder) is not None:
            kind = "a file" if self.folder.is_file() else "a saved prompt"
            raise OptionError(
                f"{self.folder} is {kind}; a store is a folder whose subfolders are saved prompts.",
                "Pass another folder, and copy the prompt into it with `add`.",
            )

    def __repr__(self) -> str:
        return f"PromptStore({str(self.folder)!r})"

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _is_name(name) and _is_entry(self.folder / name)

    # --- look up ------------------------------------------------------------------------------------------------------

    def names(self, tag: str | None = None) -> list[str]:
        """List the names of the prompts in alphabetical order.

        Args:
            tag: list only the prompts with this tag.

        Raises:
            CheckpointError: the tags of a prompt are damaged.
        """
        try:
            found = sorted(entry.name for entry in self.folder.iterdir() if _is_name(entry.name) and _is_entry(entry))
        except FileNotFoundError:
            return []
        return found if tag is None else [name for name in found if tag in read_tags(self.folder / name)]

    def path(self, name: str) -> Path:
        """Return the folder of a prompt.

        Raises:
            NotAttachedError: the store has no prompt with this name.
        """
        if name not in self:
            raise NotAttachedError(
                f"the store has no prompt named {name!r}.",
                f"Add it with `PromptStore({str(self.folder)!r}).add(prompt, {name!r})`."
                if isinstance(name, str) and _is_name(name)
                else f"Names have {_RULE}.",
                store=self.folder,
                prompts=", ".join(map(repr, self.names())) or "none",
            )
        return self.folder / name

    def load(
        self, model: nn.Module, name: str, *, as_name: str | None = None, trainable: bool = False, strict: bool = True
    ) -> SoftPrompt:
        """Load a prompt onto its base model, and activate it.

        Args:
            model: the base model.
            name: the name of the prompt in the store.
            as_name: the name of the prompt on the model; by default, its name in the store.
            trainable, strict: as in `softhooks.load`. With `strict`, the prompt's file must also describe the weights of its base
                model, so that they can be compared.

        Raises:
            NotAttachedError: the store has no prompt with this name.
            CheckpointError: the prompt's file is damaged, or does not describe the weights of its base model.
            PromptMismatchError: the prompt does not fit the model, or was trained with another base model.
            AttachError: the prompt cannot be attached to the model.
        """
        folder = self.path(name)
        if strict:
            require_fingerprint(read(folder))
        return load(model, folder, as_name or name, trainable=trainable, strict=strict)

    # --- change -------------------------------------------------------------------------------------------------------

    def add(
        self,
        prompt: SoftPrompt | str | Path,
        name: str,
        *,
        tags: Iterable[str] = (),
        replace: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        """Copy a prompt into the store.

        Args:
            prompt: an attached prompt, a directory with a saved prompt, or a Hub repository.
            name: the name in the store.
            tags: the tags of the prompt, such as "production".
            replace: replace a prompt with this name, and its tags.
            revision, token: of the Hub repository, as in `softhooks.load`.

        Raises:
            OptionError: `name` or a tag has forbidden characters.
            NameTakenError: the store already has a prompt with this name.
            CheckpointError: there is no prompt, its file is damaged, or it does not describe the weights of its base model.
            PromptMismatchError: the prompts in the store belong to another base model.
        """
        if not isinstance(name, str) or not _is_name(name):
            raise OptionError(f"{name!r} cannot be a prompt's name; use {_RULE}.")
        chosen = checked_tags(tags)
        if isinstance(prompt, SoftPrompt):
            with gathered(prompt) as writes:
                if writes:
                    self._write(prompt.to_stored(), name, chosen, replace)
        else:
            self._write(find(prompt, revision, token), name, chosen, replace)

    def add_collection(
        self, slug: str, *, tags: Iterable[str] = (), replace: bool = False, token: str | bool | None = None
    ) -> list[str]:
        """Copy the prompts of a collection on the Hub into the store.

        Each prompt gets the name of its repository, without the owner and with `-` for characters that names cannot have. All
        prompts are downloaded and checked before the first one is written.

        Args:
            slug: the last part of the collection's address, such as `me/prompts-64f9a55bb3115b4f513ec026`. Models in it must be
                prompts; datasets, papers and Spaces are skipped.
            tags, replace, token: as in `add`.

        Returns:
            the names in the store.

        Raises:
            CheckpointError: the collection cannot be read, or a model in it is not a prompt, as in `add`.
            NameTakenError: the store already has a prompt of this name, or two repositories have the same name.
            PromptMismatchError: the prompts belong to different base models.
        """
        chosen, found = checked_tags(tags), {}
        for repo_id in repositories_of(slug, token):
            name = re.sub(r"[^A-Za-z0-9_-]", "-", repo_id.rpartition("/")[2])
            if name in found or not _is_name(name):
                raise NameTakenError(
                    f"{repo_id!r} would be named {name!r} in the store, which "
                    + (
                        "is the name of another prompt of the collection."
                        if name in found
                        else "cannot be a prompt's name."
                    ),
                    "Add the prompts of the collection with `add`, and name them.",
                )
            found[name] = find_on_hub(repo_id, token=token)
            self._require_free(name, replace)
            require_fingerprint(found[name])
            self._require_base_of_others(found[name], name)
            require_same_base(next(iter(found.items())), (name, found[name]))
        for name, stored in found.items():
            self._write(stored, name, chosen, replace)
        return list(found)

    def _require_free(self, name: str, replace: bool) -> None:
        taken = [other for other in self.names() if other.lower() == name.lower()]
        if taken and not (replace and taken == [name]):
            raise NameTakenError(
                f"the store already has a prompt named {taken[0]!r}; names must differ in more than upper and lower case.",
                "Pass `replace=True` (`--replace` on a command line) to replace it, or choose another name.",
                store=self.folder,
            )

    def _write(self, stored: StoredPrompt, name: str, tags: list[str], replace: bool) -> None:
        self._require_free(name, replace)
        require_fingerprint(stored)
        self._require_base_of_others(stored, name)
        softhooks_files.write(stored, self.folder / name)
        write_tags(self.folder / name, tags)

    def _require_base_of_others(self, stored: StoredPrompt, name: str) -> None:
        """Compare the base model of a new prompt with that of another prompt in the store; skip damaged ones."""
        for other in self.names():
            if other == name:
                continue
            with contextlib.suppress(CheckpointError):
                require_same_base((other, read(self.folder / other)), (name, stored))
                return

    def remove(self, name: str) -> None:
        """Delete a prompt and its tags from the store; models that it is loaded onto keep it.

        Other files in its folder are left.

        Raises:
            NotAttachedError: the store has no prompt with this name.
        """
        folder = self.path(name)
        for file in _OWN_FILES:
            (folder / file).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder contains other files, or is a link
            folder.rmdir()

    def tags(self, name: str) -> list[str]:
        """Return the tags of a prompt in alphabetical order.

        Raises:
            NotAttachedError: the store has no prompt with this name.
            CheckpointError: the file with the tags is damaged.
        """
        return read_tags(self.path(name))

    def tag(self, name: str, *tags: str) -> None:
        """Add tags to a prompt.

        Raises:
            NotAttachedError: the store has no prompt with this name.
            OptionError: a tag has forbidden characters, or there are too many.
        """
        folder = self.path(name)
        write_tags(folder, {*read_tags(folder), *checked_tags(tags)})

    def untag(self, name: str, *tags: str) -> None:
        """Remove tags from a prompt; tags that it does not have are ignored.

        Raises:
            NotAttachedError: the store has no prompt with this name.
        """
        folder = self.path(name)
        write_tags(folder, {*read_tags(folder)} - {*tags})


def _is_name(name: str) -> bool:
    return is_prompt_name(name) and len(name) <= _MAX_NAME


def _is_entry(folder: Path) -> bool:
    return format_of(folder) == "softhooks"
