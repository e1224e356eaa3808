"""Write software bills of materials (SBOMs) in the CycloneDX format; `make sbom` and `make dist` run this.

A wheel contains one about itself and the packages that it requires, in `.dist-info/sboms/` (PEP 770). `make sbom` writes another
one to `dist/`, with the tested version and the hashes of everything that `pip install softhooks` brings.
"""

import datetime as dt
import email.message
import os
import re
import subprocess
import sys
import tomllib
import uuid
from pathlib import Path

from cyclonedx.factory.license import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

ROOT = Path(__file__).resolve().parent.parent


def of_wheel(metadata: email.message.Message, epoch: int) -> str:
    """Describe a wheel and its requirements, without their versions: those are chosen when the wheel is installed.

    Args:
        metadata: the wheel's METADATA.
        epoch: the time of the commit, in seconds; the same commit gives the same text.
    """
    name, version = metadata["Name"], metadata["Version"]
    own = _component(name, version, str(metadata["License-Expression"]))
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"pkg:pypi/{name}@{version}"))
    bom.metadata.component = own
    bom.metadata.tools = ToolRepository()
    bom.metadata.timestamp = dt.datetime.fromtimestamp(epoch, dt.UTC)
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    parts = [_component(re.split(r"[^A-Za-z0-9_.-]", line)[0], None, None) for line in required]
    for part in parts:
        bom.components.add(part)
    bom.register_dependency(own, parts)
    text = JsonV1Dot6(bom).output_as_string(indent=2)
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if problem is not None:
        raise SystemExit(f"the SBOM of the wheel is invalid: {problem}")
    return text + "\n"


def _component(name: str, version: str | None, license_expression: str | None) -> Component:
    purl = PackageURL("pypi", name=name.lower().replace("_", "-"), version=version)
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        purl=purl,
        bom_ref=str(purl),
        licenses=[LicenseFactory().make_from_string(license_expression)] if license_expression else None,
        external_references=[
            ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri("https://pypi.org/project/" + name))
        ],
    )


def write_resolved(target: Path) -> None:
    """Write the SBOM of everything that is installed with softhooks, in the versions of constraints.txt."""
    uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    uv += ["--generate-hashes", "--no-annotate", "--no-header", "--constraints", "constraints.txt", "pyproject.toml"]
    resolved = subprocess.run(uv, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    made = [sys.executable, "-W", "ignore", "-m", "cyclonedx_py", "requirements", "-", "--output-reproducible"]
    made += ["--pyproject", "pyproject.toml", "--mc-type", "library", "-o", str(target)]
    subprocess.run(made, cwd=ROOT, check=True, input=resolved, text=True)
    print(f"{os.path.relpath(target, ROOT)}: {len(re.findall('^[^ #].*==', resolved, re.MULTILINE))} packages")


def main() -> None:
    """Write the SBOM of the locked packages to `dist/`."""
    version = re.search(r'__version__ = "(.+)"', (ROOT / "softhooks" / "_version.py").read_text())[1]
    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    (ROOT / "dist").mkdir(exist_ok=True)
    write_resolved(ROOT / "dist" / f"{name}-{version}.cdx.json")


if __name__ == "__main__":
    main()
