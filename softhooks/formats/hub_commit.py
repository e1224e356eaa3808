"""The commit on the Hub that a prompt was loaded from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from softhooks.base_model.cached_commits import REPOSITORY
from softhooks.errors import CheckpointError

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubCommit:
    """A commit of a repository on the Hub.

    Attributes:
        repo_id: the name of the repository.
        commit_hash: the full hash of the commit.
    """

    repo_id: str
    commit_hash: str

    @classmethod
    def from_json(cls, value: Any, source: str) -> HubCommit | None:
        """Read a commit from a saved prompt; raise a `CheckpointError` if it is malformed."""
        if value is None:
            return None
        names = [value.get(key) for key in ("repo_id", "commit_hash")] if isinstance(value, dict) else []
        repo_id, commit_hash = map(str, names) if names else ("", "")
        if not REPOSITORY.fullmatch(repo_id) or not _COMMIT.fullmatch(commit_hash):
            raise CheckpointError(
                f"'loaded_from' in {source} is {str(value)[:200]!r}; it must contain a `repo_id` and a `commit_hash`.",
                "Save the prompt again.",
            )
        return cls(repo_id, commit_hash)

    def to_json(self) -> dict[str, str]:
        """Return the commit in the format of a saved prompt."""
        return {"repo_id": self.repo_id, "commit_hash": self.commit_hash}

    def __str__(self) -> str:
        return f"{self.repo_id} at {self.commit_hash}"
