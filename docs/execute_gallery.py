"""Runs the scripts of the gallery and writes a page for each: its text, figure, output and code."""

import ast
import contextlib
import io
import os
import runpy
from pathlib import Path

import matplotlib as mpl

GALLERY = Path(__file__).parent / "gallery"

PAGE = """\
# {title}

{text}

![{title}]({name}.png)

```text
{printed}
```

```python
{code}
```
"""


def write_pages(app=None):
    """A page and a figure beside each script; an error in a script ends the build."""
    mpl.use("agg")
    for script in sorted(GALLERY.glob("*.py")):
        source = script.read_text(encoding="utf-8")
        title, text = ast.get_docstring(ast.parse(source)).split("\n\n", 1)
        page = PAGE.format(
            title=title.rstrip("."),
            text=text,
            name=script.stem,
            printed=run(script).strip(),
            code=source.split('"""\n', 2)[1].strip(),
        )
        script.with_suffix(".md").write_text(page, encoding="utf-8")


def run(script):
    """Run one script and save its figure; returns what it printed."""
    from matplotlib import pyplot

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(os.fspath(script))
    pyplot.savefig(script.with_suffix(".png"), dpi=100)
    pyplot.close("all")
    return printed.getvalue()
