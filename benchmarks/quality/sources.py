"""The sources of the tasks' rows: WordNet's nouns and the descriptions of Debian's packages.

They are read from the machine if it has them. Otherwise, they are fetched once, with apt, into `softhooks/quality` in the user's
cache directory, so that all runs have the same rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.quality.apt import Apt
from softhooks.demo.smollm2 import cache_directory
from softhooks.errors import SoftHooksError

WORDNET = "WordNet 3.0"
WORDNET_PACKAGE = "wordnet-base"
WORDNET_DIRECTORY = Path("/usr/share/wordnet")
NOUNS = "data.noun"
NOUNS_SHA256 = "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"
"""Of WordNet 3.0 as packaged by Debian. Another file would give other rows."""

PACKAGES = "debian-packages.jsonl"


@dataclass(frozen=True)
class Package:
    """A binary package of Debian.

    Attributes:
        name, source: the names of the package and of its source package.
        section: such as `games`.
        synopsis: the one-line description.
        paragraphs: those of the long description, without lists and preformatted text.
    """

    name: str
    source: str
    section: str
    synopsis: str
    paragraphs: tuple[str, ...]


def quality_cache() -> Path:
    """Return the directory for fetched files."""
    return cache_directory() / "quality"


def read_nouns(cache: Path | None = None) -> tuple[str, dict[str, str]]:
    """Return the text of WordNet's `data.noun`, and its provenance.

    Raises:
        SoftHooksError: the machine does not have the file, and it cannot be fetched.
    """
    cached = (cache or quality_cache()) / NOUNS
    for directory in (cached.parent, *_wordnet_directories()):
        file = directory / NOUNS
        if file.is_file() and _sha256(content := file.read_bytes()) == NOUNS_SHA256:
            break
    else:
        content = _fetch_nouns(cached)
    return content.decode(), {WORDNET: f"{NOUNS}, SHA-256 {NOUNS_SHA256}"}


def read_packages(cache: Path | None = None) -> tuple[list[Package], dict[str, str]]:
    """Return the packages of a Debian release that have a long description, and their provenance.

    Raises:
        SoftHooksError: the packages are not in the cache, and cannot be fetched.
    """
    cached = (cache or quality_cache()) / PACKAGES
    if not cached.is_file():
        _fetch_packages(cached)
    with cached.open(encoding="utf-8") as lines:
        provenance: dict[str, str] = json.loads(next(lines))
        packages = [
            Package(**(content := json.loads(line)) | {"paragraphs": tuple(content["paragraphs"])}) for line in lines
        ]
    return packages, provenance


def parse_packages(index: str, translations: str) -> Iterator[Package]:
    """Parse `Packages`, which has names and sections, and `Translation-en`, which has synopses and long descriptions."""
    described = {_key(fields): fields["Description-en"] for fields in _records(translations)}
    seen = set()
    for fields in _records(index):
        name, description = fields["Package"], described.get(_key(fields))
        if description is None or name in seen:
            continue
        seen.add(name)
        synopsis, _, long = description.partition("\n")
        if paragraphs := tuple(_paragraphs(long)):
            source = fields.get("Source", name).split()[0]  # a version may follow
            yield Package(name, source, fields.get("Section", ""), " ".join(synopsis.split()), paragraphs)


def _wordnet_directories() -> list[Path]:
    """Return where WordNet may be installed; the variables are those of WordNet's own programs."""
    search, home = os.environ.get("WNSEARCHDIR"), os.environ.get("WNHOME")
    return [*([Path(search)] if search else []), *([Path(home) / "dict"] if home else []), WORDNET_DIRECTORY]


def _fetch_nouns(file: Path) -> bytes:
    """Fetch `data.noun`; other processes see it only when it is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    remedy = f"Set WNSEARCHDIR to a directory with {NOUNS} of {WORDNET}, or install Debian's package {WORDNET_PACKAGE}."
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetching-") as temporary:
        apt = Apt(Path(temporary) / "apt", WORDNET, remedy)
        content = apt.member(WORDNET_PACKAGE, f".{WORDNET_DIRECTORY / NOUNS}")
        if _sha256(content) != NOUNS_SHA256:
            raise SoftHooksError(
                f"the package {WORDNET_PACKAGE} has another {NOUNS} than the benchmark's.",
                remedy,
                expected=NOUNS_SHA256,
                found=_sha256(content),
            )
        part = Path(temporary) / NOUNS
        part.write_bytes(content)
        part.replace(file)
    return content


def _fetch_packages(file: Path) -> None:
    """Fetch the index of a release, and write what the tasks need of it; other processes see only the complete file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    remedy = f"Run the benchmark on Debian with a network connection, or copy {file} from a machine that has it."
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetching-") as temporary:
        release, index, translations = Apt(Path(temporary) / "apt", "Debian's package index", remedy).index()
        provenance = {
            f"Debian {release}, Packages": f"SHA-256 {_sha256(index.read_bytes())}",
            f"Debian {release}, Translation-en": f"SHA-256 {_sha256(translations.read_bytes())}",
        }
        part = Path(temporary) / PACKAGES
        packages = parse_packages(index.read_text(encoding="utf-8"), translations.read_text(encoding="utf-8"))
        with part.open("w", encoding="utf-8") as output:
            output.write(json.dumps(provenance) + "\n")
            output.writelines(json.dumps(asdict(package)) + "\n" for package in packages)
        part.replace(file)


def _records(text: str) -> Iterator[dict[str, str]]:
    """Yield the records of a Debian control file; the lines that continue a field keep their indentation."""
    for record in text.split("\n\n"):
        fields = re.findall(r"^([\w-]+): ?(.*(?:\n[ \t].*)*)", record, re.MULTILINE)
        if fields:
            yield dict(fields)


def _key(fields: dict[str, str]) -> tuple[str, str]:
    return fields["Package"], fields.get("Description-md5", "")


def _paragraphs(description: str) -> Iterator[str]:
    """Yield the paragraphs of a long description, without lists and preformatted text, which are indented or have bullets."""
    for paragraph in re.split(r"^ \.[ \t]*$", description, flags=re.MULTILINE):
        lines = [line for line in paragraph.split("\n") if line.strip()]
        if lines and not any(re.match(r" (\s|[-*+•] )", line) for line in lines):
            yield " ".join(" ".join(lines).split())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
