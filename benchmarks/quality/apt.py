"""Debian's package index and packages, fetched with apt into a directory of their own, without root and without installation."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from softhooks.errors import SoftHooksError

# Hooks of the machine, such as updates of desktop catalogs, are cleared; descriptions are fetched even where that is turned off.
_CONFIGURATION = """\
#clear APT::Update;
#clear Acquire::Languages;
Acquire::Languages {{ "en"; }};
Acquire::GzipIndexes "false";
APT::Sandbox::User "root";
Dir::State::Lists "{directory}/lists";
Dir::Cache "{directory}";
"""


class Apt:
    """apt with the machine's sources and keys, and with its files in an empty directory.

    Args:
        directory: an empty directory.
        wanted: what is fetched, for messages.
        remedy: what to do without apt, for messages.
    """

    def __init__(self, directory: Path, wanted: str, remedy: str) -> None:
        self.directory, self.wanted, self.remedy = directory.resolve(), wanted, remedy
        for name in ("lists/partial", "archives/partial"):
            (directory / name).mkdir(parents=True)
        (directory / "apt.conf").write_text(_CONFIGURATION.format(directory=self.directory), encoding="utf-8")

    def index(self) -> tuple[str, Path, Path]:
        """Fetch the index; return the release's code name, `Packages`, and `Translation-en`, which has the descriptions."""
        self._fetch("update")
        targets: dict[tuple[str, str], Path] = {}
        fields = "$(ORIGIN)|$(CODENAME)|$(SUITE)|$(COMPONENT)|$(CREATED_BY)|$(FILENAME)"
        for line in self._output("apt-get", "indextargets", "--format", fields).splitlines():
            origin, release, suite, component, kind, file = line.split("|", maxsplit=5)
            # The updates of a release, such as bookworm-security, change often, and are left out.
            if (origin, component) == ("Debian", "main") and "-" not in release + suite and Path(file).is_file():
                targets.setdefault((release, kind), Path(file))
        for release, kind in targets:
            if kind == "Packages" and (release, "Translations") in targets:
                return release, targets[release, kind], targets[release, "Translations"]
        raise self._error("apt has no package index of a Debian release, with descriptions")

    def member(self, package: str, member: str) -> bytes:
        """Fetch a package, and return a file from it.

        Args:
            member: the path of the file, such as `./usr/share/doc/...`.
        """
        self._fetch("update")
        self._fetch("download", package)
        found = sorted(self.directory.glob(f"{package}_*.deb"))
        if not found:
            raise self._error(f"apt did not download {package}")
        archive = self.directory / "package.tar"
        with archive.open("wb") as output:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", found[0].name], cwd=self.directory, stdout=output, check=True)
        with tarfile.open(archive) as files:
            content = files.extractfile(member) if member in files.getnames() else None
            if content is None:
                raise self._error(f"{found[0].name} does not contain {member}")
            return content.read()

    def _fetch(self, *arguments: str) -> None:
        """Run apt-get with a progress bar; callers check whether the file is there, because apt may succeed in part."""
        console = Console(stderr=True)
        command = self._command("apt-get", "-qq", "-o", "APT::Status-Fd=1", *arguments)
        with (
            (self.directory / "messages").open("a", encoding="utf-8") as messages,
            Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
            subprocess.Popen(
                command, cwd=self.directory, env=_environment(), stdout=subprocess.PIPE, stderr=messages, text=True
            ) as process,
        ):
            bar = progress.add_task(f"apt-get {' '.join(arguments)}", total=100)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("dlstatus:"):
                    progress.update(bar, completed=float(line.split(":")[2]))

    def _output(self, program: str, *arguments: str) -> str:
        command = self._command(program, *arguments)
        return subprocess.run(
            command, cwd=self.directory, env=_environment(), capture_output=True, text=True, check=False
        ).stdout

    def _command(self, program: str, *arguments: str) -> Sequence[str]:
        missing = [name for name in (program, "dpkg-deb") if shutil.which(name) is None]
        if missing:
            raise self._error(f"the machine has no {missing[0]}")
        return [program, "-c", str(self.directory / "apt.conf"), *arguments]

    def _error(self, found: str) -> SoftHooksError:
        messages = self.directory / "messages"
        said = messages.read_text(encoding="utf-8").strip() if messages.is_file() else ""
        return SoftHooksError(
            f"{self.wanted} cannot be fetched: {found}.", self.remedy, **({"apt-get": said} if said else {})
        )


def _environment() -> dict[str, str]:
    return os.environ | {"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
