"""Look up every pinned package in a database of known vulnerabilities with pip-audit; `make audit` runs this.

The exit status is 1 if a package has a known vulnerability, and 0 if none has one. It is also 0 if no database can be reached;
then, the last line says so.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_SERVICES = ("osv", "pypi")
_TIMEOUT = 20  # seconds, for one request


def main() -> int:
    """Ask one database after the other, until one answers."""
    files = [ROOT / "constraints.txt", ROOT / "locks" / "release.txt"]
    found = [pins(file.read_text()) for file in files]
    count = len({pin for part in found for pin in part})
    for service in _SERVICES:
        answers = list(itertools.takewhile(lambda answer: answer is not None, (ask(service, part) for part in found)))
        if len(answers) < len(found):
            continue
        problems = sorted({line for answer in answers for line in answer or ()})
        print("\n".join([*problems, f"audit: {service} knows {len(problems)} vulnerabilities of {count} packages"]))
        return 1 if problems else 0
    print(f"audit: NOT DONE: no database can be reached ({', '.join(_SERVICES)}); {count} packages were not looked up")
    return 0


def pins(text: str) -> list[str]:
    """List the pins of a file of constraints or of a lock."""
    return re.findall(r"^[A-Za-z0-9_.-]+==[^ ;\\\n]+", text, re.MULTILINE)


def ask(service: str, pinned: list[str]) -> list[str] | None:
    """Look up packages in a database. -> one line for each vulnerability, or None if the database did not answer for all."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text("\n".join(pinned) + "\n")
        # `--strict`: a package that the database does not answer for is an error, not a package without vulnerabilities
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--strict",
            "--no-deps",
            "--disable-pip",
            "--progress-spinner=off",
        ]
        command += [
            "--format=json",
            f"--vulnerability-service={service}",
            f"--timeout={_TIMEOUT}",
            f"--requirement={listed}",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    lines = vulnerabilities(done.stdout)
    if lines is None:
        print(f"audit: {service} did not answer: {(done.stderr.strip().splitlines() or ['no message'])[-1][:160]}")
    return lines


def vulnerabilities(answer: str) -> list[str] | None:
    """Read pip-audit's JSON. -> one line for each vulnerability, or None if it is no answer."""
    try:
        packages: list[dict[str, Any]] = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return None
    if not packages or any("vulns" not in package for package in packages):
        return None
    return [
        f"{package['name']} {package['version']}: {one['id']}, fixed in {', '.join(one['fix_versions']) or 'no version'}"
        for package in packages
        for one in package["vulns"]
    ]


if __name__ == "__main__":
    sys.exit(main())
