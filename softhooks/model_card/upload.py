"""Upload a prompt and its model card to the Hub."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from softhooks.model_card.card import FILE, CardFacts
from softhooks.model_card.curves import PICTURE
from softhooks.model_card.write import is_ours, write_card

logger = logging.getLogger(__name__)

CARD_FILES = (FILE, PICTURE)
"""The files of a model card."""

_PULL_REQUEST = re.compile(r"refs/pr/\d+")


def upload(
    folder: Path, facts: CardFacts, private: bool | None, token: str | bool | None, revision: str | None, **kwargs: Any
) -> CommitInfo:
    """Upload a directory that contains the files of a prompt, and add the model card; see `SoftPrompt.push_to_hub`."""
    api = HfApi(token=token, library_name="softhooks")
    repo_id = api.create_repo(facts.repo_id, private=private, exist_ok=True).repo_id  # with the user's name
    if revision is not None and revision != "main" and not _PULL_REQUEST.fullmatch(revision):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    given = folder / FILE
    present = _load(given) if given.is_file() else _present_card(repo_id, revision, token)
    if present is None or is_ours(present):
        write_card(replace(facts, repo_id=repo_id), folder, present)
    else:
        logger.warning("The model card of %s was not written by softhooks; it is kept as it is.", repo_id)
    commit: CommitInfo = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, **kwargs)
    return commit


def _present_card(repo_id: str, revision: str | None, token: str | bool | None) -> ModelCard | None:
    try:
        path = hf_hub_download(repo_id, FILE, revision=revision, token=token)
    except EntryNotFoundError:
        return None
    return _load(Path(path))


def _load(path: Path) -> ModelCard:
    card: ModelCard = ModelCard.load(path, ignore_metadata_errors=True)
    return card
