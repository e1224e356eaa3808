"""Check the import contracts of pyproject.toml with import-linter.

import-linter follows one directory for each package, and `softhooks.integrations` lies in the repository's top-level
`integrations/`. So both are copied into `build/lint/softhooks`, as a wheel has them, and the copy is checked.
"""

import os
import shutil
import sys
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parent.parent


def main(root: Path = ROOT) -> int:
    """Copy the packages, check the copy, and return import-linter's exit status."""
    copy = root / "build" / "lint"
    shutil.rmtree(copy, ignore_errors=True)
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "softhooks", copy / "softhooks", ignore=without_caches)
    shutil.copytree(root / "integrations", copy / "softhooks" / "integrations", ignore=without_caches)
    os.chdir(copy)
    sys.path.insert(0, str(copy))  # before an editable install, which import-linter would follow otherwise
    return lint_imports(config_filename=str(root / "pyproject.toml"), no_cache=True, no_logo=True)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
