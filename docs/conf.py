"""Sphinx settings: `sphinx-build -W -b html docs build/docs` makes the site; warnings are errors."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ekgfx  # noqa: E402

project = "ekgfx"
author = "the ekgfx developers"
project_copyright = f"2026, {author}"
release = version = ekgfx.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_click"]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = f"ekgfx {release}"
html_static_path: list[str] = []

myst_heading_anchors = 3
# Links to files beside the documents (examples, the licence) hold in the repository;
# tests/repository/test_docs.py checks them.
suppress_warnings = ["myst.xref_missing"]

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100  # longer ones get a line for each parameter
python_use_unqualified_type_names = True
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
