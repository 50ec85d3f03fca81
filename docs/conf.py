"""How the documentation is built: `make docs`, or sphinx-build with this directory."""

from importlib import metadata

project = "vq"
release = metadata.version("vq")
copyright = "the authors of vq"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.apidoc", "sphinx.ext.viewcode"]
exclude_patterns = ["reference/modules.rst"]

html_theme = "furo"
html_title = "vq"

# The reference is made from the docstrings, where `name` names something of ours.
apidoc_modules = [
    {
        "path": "../vq",
        "destination": "reference",
        "exclude_patterns": ["../vq/__main__.py"],
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
default_role = "py:obj"
suppress_warnings = ["ref.python"]  # a public name stands in `vq` and in its module

myst_heading_anchors = 3
