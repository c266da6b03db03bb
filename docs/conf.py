"""The documentation site: `make docs` builds it into build/docs."""

import re
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

import exactflow

project = "exactflow"
author = "the exactflow authors"
release = version = exactflow.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # the log's headings may skip a level
html_theme = "furo"
html_title = "exactflow"
html_show_copyright = False
html_math_renderer = "mathml"  # what browsers draw by themselves: no script from elsewhere
templates_path: list[str] = []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 80
napoleon_use_ivar = True  # a dataclass's attributes are described once, in its docstring

# Docstrings are plain text: code in single backticks; `|det|` and `x_` mean themselves.
_CODE_OR_MARK = re.compile(r"`([^`]+)`|[|*]|(?<=\w)_(?!\w)")
_FUNCTION = re.compile(r"\\(ln|log_2|det)(?![a-z])")
_ACCENT = re.compile(r"\{(?=\\(?:bar|dot|hat|tilde)\b)")
_LINK_ABOVE = re.compile(r"\[[^\]]+\]\(\.\./([^)]+)\)")


def _docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape it; a property's first line must not be taken for `type: description`."""

    def plain(found: re.Match[str]) -> str:
        return f"``{found[1]}``" if found[1] else f"\\{found[0]}"

    lines[:] = [_CODE_OR_MARK.sub(plain, line) for line in lines]
    if what == "property":
        lines.insert(0, "")


def _page(app: Any, page: str, source: list[str]) -> None:
    """Links to files of the repository above docs/ become their paths."""
    if "/" not in page:
        source[0] = _LINK_ABOVE.sub(r"`\1`", source[0])


def _math(writer: Any, node: Any) -> None:
    """A formula as MathML."""
    tex = _FUNCTION.sub(r"\\,\g<0>\\,", node.astext())  # the space that docutils leaves out
    tex = _ACCENT.sub("{{}", tex)  # else it puts the index of an accented letter below it
    writer.body.append(tex2mathml(tex, as_block=node.tagname == "math_block"))
    raise SkipNode


def setup(app: Any) -> None:
    """Prepare docstrings before napoleon reads them, and pages before MyST does."""
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))
    app.connect("autodoc-process-docstring", _docstring, priority=400)
    app.connect("source-read", _page)
