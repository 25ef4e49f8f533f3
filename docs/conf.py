"""How the pages are built: `make docs`, or python -m sphinx -W --keep-going docs docs/_build. Needs no network."""

from absynth import __version__

project = "absynth"
author = "The absynth developers"
copyright = "2026, " + author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"absynth {release}"
html_show_sphinx = False
html_copy_source = False
templates_path: list[str] = []
