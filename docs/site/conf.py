"""Sphinx's configuration of the documentation site. `make docs` builds it into build/docs, and every warning is an error.

The source directory is the repository, so the pages keep the links that work in the repository, and Sphinx checks them.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import softhooks  # noqa: E402 - from this repository

project, author, release = "softhooks", "the softhooks authors", softhooks.__version__
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports which kernels a machine lacks

copyright = f"{author}; Apache-2.0"  # noqa: A001 - Sphinx's name

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "markdown_docstrings",
    "navigation",
]
root_doc = "docs/README"
include_patterns = [
    "docs/*.md",
    "docs/**/*.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "benchmarks/*/README.md",
    "benchmarks/results/*.md",
]
exclude_patterns = [".*", "build", "softhooks", "integrations", "tests"]
nitpicky = False  # docstrings set code in single backticks, which are references only if they name something

myst_enable_extensions = ["attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # the changelog's headings skip a level

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_custom_sections = [("Shape", "returns_style")]
default_role = "py:obj"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
maximum_signature_line_length = 90
add_module_names = False

html_theme = "furo"
html_title = "softhooks"
html_static_path = ["static"]
templates_path = ["templates"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_additional_pages = {"index": "redirect.html"}
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#4a4fb5", "color-brand-content": "#3f51b5"},
    "dark_css_variables": {"color-brand-primary": "#a5abff", "color-brand-content": "#9fa8ff"},
}
