"""Sphinx configuration: Markdown pages and docstrings, and nothing from the network."""

from importlib.metadata import version as _version

project = "fisherkern"
author = "the fisherkern authors"
copyright = author  # noqa: A001
release = _version("fisherkern")
version = release

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"fisherkern {release}"
smartquotes = False  # shapes are written [..., V]
html_copy_source = False
html_show_sourcelink = False

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # the signature of an op is in its Args, with shapes
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# what an op returns is prose: a colon in it does not set off a type
napoleon_custom_sections = [("Returns", "prose")]

nitpicky = True
# LinAlgError has no page in the inventory of torch
nitpick_ignore = [("py:exc", "torch.linalg.LinAlgError")]
