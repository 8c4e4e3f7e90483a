"""README.md from nbs/index.ipynb: `python -m tests.readme` writes it, with `--check` it only says whether it is up to date.

Cells flagged `#| hide` are left out, `#| echo: false` keeps a cell's output only, and other `#|` lines are removed. Saved outputs are kept
as text. Links and pictures of the notebook are relative to `nbs/`; in README.md they are relative to the repository."""

import posixpath
import re
import sys

import nbformat
from nbconvert import MarkdownExporter

from tests.repo import ROOT, directives

INDEX, README = ROOT / "nbs/index.ipynb", ROOT / "README.md"
ELSEWHERE = re.compile(r"^([a-z][a-z0-9+.-]*:|#|/)", re.I)
LINK = re.compile(r'(\]\(|\b(?:src|href)=["\'])([^)"\'\s]+)')


def visible(cell):
    "The cell as a reader of README.md sees it, or None."
    words = directives(cell)
    if ["hide"] in words or any(w[0] in ("default_exp", "export", "exporti") for w in words):
        return None
    if cell.cell_type == "raw":
        return None
    if cell.cell_type == "code":
        for o in cell.outputs:
            if "data" not in o:
                continue
            kind = next((k for k in ("text/markdown", "text/plain") if k in o.data), None)
            if not kind:
                raise ValueError(
                    f"an output of nbs/index.ipynb is only {sorted(o.data)}: save it under nbs/images and show it in a markdown cell"
                )
            o.data = {kind: o.data[kind]}
        cell.source = re.sub(r"^\s*#\s*\|.*\n?", "", cell.source, flags=re.M).strip()
        if ["echo:", "false"] in words:
            cell.metadata["transient"] = {"remove_source": True}
        if not cell.source and not cell.outputs:
            return None
    return cell


def relink(match):
    start, target = match.groups()
    return match[0] if ELSEWHERE.match(target) else start + posixpath.normpath(posixpath.join("nbs", target))


def render(index=INDEX):
    "The text of README.md."
    nb = nbformat.read(index, as_version=4)
    nb.cells = [c for c in map(visible, nb.cells) if c]
    for c in nb.cells:
        if c.cell_type == "markdown":
            c.source = LINK.sub(relink, c.source)
    nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean removes it; it names the language of code blocks
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def targets(text):
    "The files that a README refers to."
    return {t.split("#")[0] for _, t in LINK.findall(text) if not ELSEWHERE.match(t)}


def main():
    text = render()
    if "--check" not in sys.argv[1:]:
        README.write_text(text, encoding="utf-8")
    elif README.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb says: run python -m tests.readme")


if __name__ == "__main__":
    main()
