"""A directory of exported prompts that a server watches: each request finds the current file of the prompt that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from softhooks.errors import CheckpointError, OptionError
from softhooks.serving.prefix import Prefix
from softhooks.serving.prefix_files import SUFFIX, check_name, prefix_file, read_prefix

_SHOWN = 20


@dataclass(frozen=True)
class FoundPrefix:
    """A prefix in the directory.

    Attributes:
        signature: the inode, the size and the time of the last change of the file that it was read from.
    """

    name: str
    prefix: Prefix
    digest: str
    signature: tuple[int, int, int]


class PromptFolder:
    """Exported prompts by name. Files that are added, replaced or deleted take effect with the next request.

    Args:
        path: the directory.

    Raises:
        OptionError: there is no such directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise OptionError(
                f"{str(self.path)!r} is not a directory; the prompts to serve must be in a directory.",
                "Write them with `softhooks export PROMPT... --to SERVER --model MODEL --output DIR`.",
            )
        self._known: dict[str, FoundPrefix] = {}

    def names(self) -> list[str]:
        """Return the names of the prompts that are in the directory now."""
        stems = [path.name.removesuffix(SUFFIX) for path in self.path.glob(f"*{SUFFIX}")]
        return sorted(stem for stem in stems if not stem.startswith("."))

    def read_all(self) -> list[FoundPrefix]:
        """Read every prompt, so that no request has to wait for its file.

        Raises:
            CheckpointError: a file is damaged, or is no exported prompt.
            OptionError: the name of a file is not the name of a prompt.
        """
        return [self.find(name) for name in self.names()]

    def find(self, name: object) -> FoundPrefix:
        """Return the prompt with this name. Its file is read only if it is new or has changed since the last call.

        Raises:
            OptionError: there is no prompt with this name.
            CheckpointError: the file is damaged, or is no exported prompt.
        """
        path = prefix_file(self.path, check_name(name))
        try:
            found = path.stat()
        except OSError as error:
            self._known.pop(str(name), None)
            raise self._unknown(str(name)) from error
        signature = found.st_ino, found.st_size, found.st_mtime_ns
        known = self._known.get(str(name))
        if known is None or known.signature != signature:
            try:
                prefix, digest = read_prefix(path)
            except CheckpointError:
                self._known.pop(str(name), None)
                if not path.exists():  # deleted since
                    raise self._unknown(str(name)) from None
                raise
            known = self._known[str(name)] = FoundPrefix(str(name), prefix, digest, signature)
        return known

    def digests(self) -> set[str]:
        """Return the digests of the prompts that were read and whose files still exist."""
        present = set(self.names())
        self._known = {name: found for name, found in self._known.items() if name in present}
        return {found.digest for found in self._known.values()}

    def _unknown(self, name: str) -> OptionError:
        names = self.names()
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return OptionError(
            f"there is no prompt {name!r}; the server has {', '.join(map(repr, names[:_SHOWN])) or 'none'}{more}.",
            f"Add it with `softhooks export {name} --to SERVER --model MODEL --output DIR`, where DIR is the directory that the "
            "server watches.",
        )
