"""How Sphinx builds the documentation: `make docs`.

The source is the whole repository, not this folder alone: pages link to the README and to the
reports under experiments/ as files do on a code host, and those become pages of the site too.
"""

import dataclasses
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
# Small networks are slowed down by more threads, and one gives the same figures everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from execute_gallery import write_pages  # noqa: E402
from sphinx.util import inspect  # noqa: E402

import spectra  # noqa: E402

project = "spectra"
author = "the spectra developers"
copyright = author
version = release = spectra.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "docs/**", "experiments/**/README.md"]
# docs/README.md is the list of pages on a code host, and a part of docs/index.md here.
exclude_patterns = ["docs/README.md", "docs/_build", ".*", "build", "dist", "tests", "spectra"]

html_theme = "furo"
html_title = f"spectra {release}"
html_copy_source = False
html_show_sourcelink = False

# Links to headings, by their text as code hosts write it.
myst_heading_anchors = 4

# Docstrings are written for help() as well: single backquotes are code.
default_role = "code"
autodoc_member_order = "bysource"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

nitpick_ignore_regex = [
    # Inventories of other projects are not fetched: a build needs no network.
    (
        "py:.*",
        r"(torch|numpy|np|scipy|transformers|lightning|collections|contextlib|pathlib|typing)\..*",
    ),
    # Imported for type checkers only, so that Sphinx sees the bare names.
    ("py:class", "Axes|Figure|Path|PreTrained.*"),
    # Names for types that are written out where they matter.
    ("py:class", "Function|Method|Record|Which|.*Table|.*block_diagonal.T"),
    # What floors say to one another.
    (
        "py:class",
        r"spectra\.(distributed\.(collectives|sharding)|objective\.vectors\.Removed|oracle\.hvp|"
        r"report\.pages).*",
    ),
]


def constructor(app, what, name, obj, options, signature, returns):
    """The arguments of a class: none of results, which are not made by hand."""
    if what != "class":
        return None
    if dataclasses.is_dataclass(obj) or issubclass(obj, tuple):
        # Their fields are described as attributes.
        return "", None
    # Not those of __new__, which SciPy's LinearOperator has.
    arguments = inspect.signature(obj.__init__, bound_method=True)
    shown = inspect.stringify_signature(
        arguments, show_return_annotation=False, unqualified_typehints=True
    )
    # A class as a default.
    return re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", shown), None


def prepare_docstring(app, what, name, obj, options, lines):
    """Docstrings of ours as napoleon and reStructuredText take them."""
    for place, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            # |λ| is no substitution here, nor *args emphasised.
            parts = re.split(r"(`[^`]*`)", line)
            lines[place] = "".join(
                part if part.startswith("`") else re.sub(r"([|*])", r"\\\1", part) for part in parts
            )
    if what in {"property", "attribute"}:
        # What stands before a colon would be taken for the type, were it in the first line.
        lines.insert(0, "\\")


def split_attributes(app, what, name, obj, options, lines):
    """One field for each of several attributes that a docstring describes together."""
    split = []
    for field in re.split(r"^(?=:ivar )", "\n".join(lines), flags=re.MULTILINE):
        together = re.match(r":ivar ([^:]*):(.*)", field, flags=re.DOTALL)
        names = together[1].split(", ") if together else []
        split += [f":ivar {each}:{together[2]}" for each in names] or [field]
    lines[:] = "".join(part if part.endswith("\n") else part + "\n" for part in split).split("\n")


def find_public(app, env, node, contnode):
    """What an annotation names by the file that defines it, the reference calls spectra.X."""
    name = node.get("reftarget", "").rpartition(".")[2]
    domain = env.get_domain("py")
    for place in ("spectra", "spectra.losses", "spectra.errors", "spectra.oracle.recompute"):
        if f"{place}.{name}" in domain.objects:
            target, kind = f"{place}.{name}", node["reftype"]
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, kind, target, node, contnode
            )
    return None


def redirect_links(app, docname, source):
    """The list of pages and the gallery's scripts are elsewhere on a code host."""
    source[0] = source[0].replace("](docs/README.md)", "](docs/index.md)")
    if docname == "docs/gallery/README":
        shown = r"[figure, numbers and script](\1.md).\n\n[![\1](\1.png)](\1.md)"
        source[0] = re.sub(r"\[script\]\((\w+)\.py\)\.", shown, source[0])
        scripts = re.findall(r"\]\((\w+)\.md\)\.", source[0])
        source[0] += "\n".join(["```{toctree}", ":hidden:", "", *scripts, "```", ""])


def lead_to_index(app, exception):
    """The site begins at docs/index.html, and a server looks for index.html."""
    if exception is None and app.builder.name == "html":
        page = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app):
    """Hooks of the build; napoleon's, between the first two, has priority 500."""
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-signature", constructor)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)
    app.connect("autodoc-process-docstring", split_attributes, priority=600)
    app.connect("missing-reference", find_public)
    app.connect("source-read", redirect_links)
    app.connect("build-finished", lead_to_index)
