"""Build the wheel and the sdist of the last commit into `dist/`, and check them; `make dist` runs this.

The wheel is built from the sdist, so the sdist is complete. Then `twine check --strict` reads their metadata, and README's first
example runs with the wheel in a new environment. The same commit gives the same files.
"""

import argparse
import email
import gzip
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

import sbom

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
_PROMISED = "frozen tensors, all unchanged"
"""What README's example prints if it works."""


def main() -> None:
    """Build and check; exit with an error at the first problem."""
    parser = argparse.ArgumentParser(prog="make dist", description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="", help="pip's arguments for torch alone, such as an index of CPU builds")
    chosen = parser.parse_args()
    if said("git", "status", "--porcelain"):
        print("The working tree has changes; what is built is the last commit.")
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        run(sys.executable, "-m", "twine", "check", "--strict", *sorted(DIST.iterdir()))
        try_example(wheel, folder / "env", chosen.torch.split())
    for file in sorted(DIST.iterdir()):
        print(f"{file.relative_to(ROOT)}  {file.stat().st_size:,} bytes")


def build(folder: Path) -> Path:
    """Build both archives with the locked setuptools, and add the SBOM to the wheel. -> the wheel."""
    epoch = int(said("git", "log", "-1", "--format=%ct"))
    os.environ["SOURCE_DATE_EPOCH"] = str(epoch)
    source = folder / "source"
    run("git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), source)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "built", source)
    [sdist], [wheel] = (folder / "built").glob("*.tar.gz"), (folder / "built").glob("*.whl")
    run(sys.executable, "-m", "wheel", "unpack", "--dest", folder / "unpacked", wheel)
    [unpacked] = (folder / "unpacked").iterdir()
    [about] = unpacked.glob("*.dist-info")
    (about / "sboms").mkdir()
    metadata = email.message_from_bytes((about / "METADATA").read_bytes())
    (about / "sboms" / f"{metadata['Name']}.cdx.json").write_text(sbom.of_wheel(metadata, epoch))
    DIST.mkdir()
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", DIST, unpacked)
    repack(sdist, DIST / sdist.name, epoch)
    return DIST / wheel.name


def repack(source: Path, target: Path, epoch: int) -> None:
    """Copy an sdist, with the time of the commit instead of the time of the build and the name of the user."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
        return member

    with (
        tarfile.open(source) as old,
        gzip.GzipFile(target, "wb", mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.pax_headers = {}
            new.addfile(plain(member), old.extractfile(member) if member.isfile() else None)


def try_example(wheel: Path, environment: Path, torch: list[str]) -> None:
    """Install the wheel in a new environment, and run README's first example with it."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    run(*pip, *torch, "torch")
    run(*pip, wheel)
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    output = said(python, "-c", example, cwd=environment)
    print(output)
    if _PROMISED not in output:
        raise SystemExit(f"README's example did not print {_PROMISED!r}.")


def run(*command: object, cwd: Path = ROOT) -> None:
    """Run a command; exit if it fails."""
    subprocess.run([str(part) for part in command], cwd=cwd, check=True, stdout=sys.stderr)


def said(*command: object, cwd: Path = ROOT) -> str:
    """Run a command; return what it prints, or exit if it fails."""
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


if __name__ == "__main__":
    main()
