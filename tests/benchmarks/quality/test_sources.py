"""The sources of rows: parsing, and fetching with a fake apt."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from pathlib import Path

import pytest

from benchmarks.quality import sources
from benchmarks.quality.sources import Package

INDEX = """\
Package: chess-data
Source: chess (2.1)
Section: games
Description: 3D chess
Description-md5: 11

Package: nodescription
Section: libs
Description: nothing long
Description-md5: 22

Package: oldtext
Section: net
Description: changed
Description-md5: 33
"""
TRANSLATIONS = """\
Package: chess-data
Description-md5: 11
Description-en: 3D chess
 Play the game
 of kings.
 .
 Features:
  * boards
 .
 Second paragraph.

Package: nodescription
Description-md5: 22
Description-en: nothing long

Package: oldtext
Description-md5: 44
Description-en: changed
 The text of another version.
"""
NOUNS = "00001740 03 n 01 entity 0 000 | that which is perceived to exist\n"


def test_package_descriptions_are_joined_with_the_index() -> None:
    [package] = sources.parse_packages(INDEX, TRANSLATIONS)
    assert package == Package(
        "chess-data", "chess", "games", "3D chess", ("Play the game of kings.", "Second paragraph.")
    )


def test_only_the_expected_wordnet_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / sources.NOUNS).write_text(NOUNS)
    monkeypatch.setattr(sources, "NOUNS_SHA256", hashlib.sha256(NOUNS.encode()).hexdigest())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / sources.NOUNS).write_text("another version")
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path / "other"))
    monkeypatch.setenv("WNHOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dict").symlink_to(tmp_path)
    text, provenance = sources.read_nouns(tmp_path / "cache")
    assert text == NOUNS
    assert sources.NOUNS_SHA256 in provenance[sources.WORDNET]


FAKE_APT = """\
#!/bin/sh
directory=$(dirname "$2")
case "$*" in
*" update") cp "{files}"/lists/* "$directory/lists/"; echo "dlstatus:1:50.0:Retrieving"; echo "a warning" >&2 ;;
*" indextargets "*)
    echo "Other|nodistro|nodistro|main|Packages|$directory/lists/Packages"
    echo "Debian|fake-security|old|main|Packages|$directory/lists/Packages"
    echo "Debian|fake-security|old|main|Translations|$directory/lists/Translation-en"
    echo "Debian|fake|old|main|Packages|$directory/lists/Packages"
    echo "Debian|fake|old|main|Translations|$directory/lists/Translation-en" ;;
*" download wordnet-base") cp "{files}/wordnet.tar" wordnet-base_1_all.deb ;;
esac
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a fake apt-get and dpkg-deb; the fake .deb is a tar archive."""
    files = tmp_path / "files"
    for directory in ("lists", "bin"):
        (files / directory).mkdir(parents=True)
    (files / "lists" / "Packages").write_text(INDEX)
    (files / "lists" / "Translation-en").write_text(TRANSLATIONS)
    with tarfile.open(files / "wordnet.tar", "w") as archive:
        member = tarfile.TarInfo("./usr/share/wordnet/data.noun")
        member.size = len(NOUNS)
        archive.addfile(member, io.BytesIO(NOUNS.encode()))
    for name, script in {"apt-get": FAKE_APT.format(files=files), "dpkg-deb": '#!/bin/sh\ncat "$2"\n'}.items():
        (files / "bin" / name).write_text(script)
        (files / "bin" / name).chmod(0o755)
    for name in ("cat", "cp", "dirname"):
        (files / "bin" / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(files / "bin"))  # so that the machine's apt is never used
    return files


def test_the_package_index_is_fetched_once(files: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    packages, provenance = sources.read_packages(cache)
    assert [package.name for package in packages] == ["chess-data"]
    assert provenance["Debian fake, Packages"] == f"SHA-256 {hashlib.sha256(INDEX.encode()).hexdigest()}"
    (files / "bin" / "apt-get").unlink()
    assert sources.read_packages(cache) == (packages, provenance)
    assert [file.name for file in cache.iterdir()] == [sources.PACKAGES]


def test_an_index_that_was_not_downloaded_is_an_error(files: Path, tmp_path: Path) -> None:
    (files / "lists" / "Translation-en").unlink()
    with pytest.raises(sources.SoftHooksError, match=r"(?s)no package index of a Debian release.*a warning"):
        sources.read_packages(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_wordnet_is_fetched_and_checked(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(sources, "_wordnet_directories", list)
    with pytest.raises(sources.SoftHooksError, match=r"has another data\.noun"):
        sources.read_nouns(cache)
    assert not list(cache.iterdir())
    monkeypatch.setattr(sources, "NOUNS_SHA256", hashlib.sha256(NOUNS.encode()).hexdigest())
    assert sources.read_nouns(cache)[0] == NOUNS
    (files / "bin" / "apt-get").unlink()
    assert sources.read_nouns(cache)[0] == NOUNS
