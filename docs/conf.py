"""How Sphinx builds the documentation: `make docs`."""

import sys
from pathlib import Path

import mas_ext

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "mas_ext"
author = "the mas_ext authors"
version = release = mas_ext.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "static_math",
]
html_math_renderer = "svg"
exclude_patterns = ["_build", "inventories"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nitpicky = False

html_theme = "furo"
html_title = "mas_ext"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# These inventories list only the names that the documentation refers to, so a build needs no
# network: a line in the first inventory format is "name type page".
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", str(HERE / "inventories/python.txt")),
    "torch": ("https://docs.pytorch.org/docs/stable", str(HERE / "inventories/torch.txt")),
}

# Every example may use these names without an import, as in a session where they are defined.
doctest_global_setup = f"""
import re, os, sys, tempfile, warnings
from importlib.util import find_spec
from pathlib import Path
import torch
import mas_ext
from torch import nn

torch.manual_seed(0)
ROOT = Path({str(HERE.parent)!r})

def importable(name):
    return find_spec(name) is not None

def run_readme(**names):
    '''Runs the first Python example in the README.'''
    code = re.search(r"```python\\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    exec(compile(code.group(1), "README.md", "exec"), names)
    return names
"""
doctest_test_doctest_blocks = ""
