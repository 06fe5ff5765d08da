"""The kit as web pages: the committed notebooks with their outputs, the documents, the API and the explorable page.

Nothing is executed. Links between the repository's files become links between pages; a file that is no page is copied.
"""

import html
import os
import re
import shutil
import warnings
from pathlib import Path
from string import Template

import mistune
import nbformat
from latex2mathml.converter import convert
from mistune.toc import add_toc_hook
from nbconvert import HTMLExporter

from kdiga_nb import paths
from kdiga_nb.notebooks import ARTEFACTS

HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="${up}site.css">
</head>
<body>
<nav aria-label="site">$links</nav>
<main>
$body
</main>
</body>
</html>
"""
STYLE = """\
:root { --back: #fbfaf8; --text: #1d2329; --line: #dcd8d1; --link: #01568a; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --text: #e9e6e1; --line: #39414a; --link: #7cc2f2; }
  main img { background: #fff; border-radius: 6px; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.6 system-ui, Roboto, sans-serif; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; padding: 0.8rem 1rem; border-bottom: 1px solid var(--line); }
main { max-width: 56rem; margin: 0 auto; padding: 0.5rem 1rem 4rem; }
a { color: var(--link); }
h1, h2, h3 { line-height: 1.25; }
img { max-width: 100%; height: auto; }
pre, .wide { overflow-x: auto; }
pre { padding: 0.8rem; border: 1px solid var(--line); border-radius: 6px; font-size: 0.85rem; line-height: 1.45; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
pre code { overflow-wrap: normal; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
"""
NAVIGATION = {"Start": "index.html", "Attack a digit": "explorable.html", "Notebooks": "notebooks/index.html"}
NAVIGATION |= {"Results": "docs/results.html", "Audit": "docs/audit.html", "API": "api/kdiga_nb.html"}
MATHS = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?!\s)(?P<inline>[^$\n]+?)(?<!\s)\$(?!\w)", re.DOTALL)
LINK = re.compile(r'(?P<kind>href|src)="(?P<target>[^"#:]+)(?P<rest>#[^"]*)?"')


def build(home: Path, explorable: str) -> list[Path]:
    """Write the site into a folder; what lies there under the same names is replaced.

    Args:
        explorable: the page of ``report.explorable``.

    Returns:
        The pages.

    Raises:
        OSError: a file cannot be written.
    """
    home.mkdir(parents=True, exist_ok=True)
    (home / "site.css").write_text(STYLE, encoding="utf-8")
    (home / "explorable.html").write_text(explorable, encoding="utf-8")
    pages = [home / "explorable.html", _document(paths.ROOT / "README.md", home, home / "index.html")]
    for source in sorted((paths.ROOT / "docs").glob("*.md")):
        pages.append(_document(source, home, home / "docs" / f"{source.stem}.html"))
    pages += [_notebook(name, home) for name in ARTEFACTS]
    pages.append(_contents(home))
    _api(home / "api")
    return pages


def _page(home: Path, path: Path, title: str, body: str) -> Path:
    up = "../" * (len(path.relative_to(home).parts) - 1)
    links = " ".join(f'<a href="{up}{target}">{name}</a>' for name, target in NAVIGATION.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    page = Template(HEAD).substitute(title=html.escape(title), up=up, links=links, body=body)
    path.write_text(page, encoding="utf-8")
    return path


def anchor(heading: str) -> str:
    """The name by which links find a heading, as GitHub makes it: ``kdigafgsm-table-5`` for "KDIGA+FGSM (Table 5)"."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _document(source: Path, home: Path, path: Path) -> Path:
    """A Markdown file as a page."""
    text = source.read_text(encoding="utf-8")
    markdown = mistune.create_markdown(escape=False, plugins=["table", "strikethrough"])
    add_toc_hook(markdown, max_level=6, heading_id=lambda token, _: anchor(token["text"]))
    body = str(markdown(text))
    body = re.sub(r"<table>.*?</table>", lambda found: f'<div class="wide">{found[0]}</div>', body, flags=re.DOTALL)
    title = re.search(r"^# (.*)", text, re.MULTILINE)
    return _page(home, path, title[1] if title else source.stem, _linked(body, source, home, path))


def _linked(body: str, source: Path, home: Path, path: Path) -> str:
    """The body with links to pages instead of files; linked files that are no pages are copied into the site."""

    def turned(found: re.Match[str]) -> str:
        file = (source.parent / found["target"]).resolve()
        place = file.relative_to(paths.ROOT)
        if place.suffix == ".md" and (place.parent.name == "docs" or place.name == "README.md"):
            place = Path("index.html") if place == Path("README.md") else place.with_suffix(".html")
        elif place.suffix == ".ipynb":
            place = place.with_suffix(".html")
        elif place == Path("published/digits/explorable.html"):
            place = Path("explorable.html")
        elif file.is_dir():
            return f'{found["kind"]}="{_relative(home / "index.html", path)}"'
        else:
            (home / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, home / place)
        return f'{found["kind"]}="{_relative(home / place, path)}{found["rest"] or ""}"'

    return LINK.sub(turned, body)


def _relative(target: Path, page: Path) -> str:
    return Path(os.path.relpath(target, page.parent)).as_posix()


def _notebook(name: str, home: Path) -> Path:
    """A notebook with its committed outputs; equations become MathML, so that nothing is loaded from elsewhere."""
    notebook = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = MATHS.sub(_equation, cell.source)
    exporter = HTMLExporter(template_name="classic", exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(notebook)
    path = home / "notebooks" / f"{name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    links = " · ".join(f'<a href="../{target}">{words}</a>' for words, target in NAVIGATION.items())
    # The exporter's scripts serve widgets and MathJax, which these pages do without.
    body = re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL)
    navigation = f'<body><nav aria-label="site" style="padding: 1em">{links}</nav>'
    path.write_text(re.sub(r"<body[^>]*>", lambda _: navigation, body, count=1), encoding="utf-8")
    return path


def _equation(found: re.Match[str]) -> str:
    block = found["block"]
    return convert(block or found["inline"], display="block" if block else "inline")


def _contents(home: Path) -> Path:
    """The list of the notebooks."""
    lines = []
    for name in ARTEFACTS:
        first = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4).cells[0].source
        lines.append(f'<li><a href="{name}.html">{html.escape(first.splitlines()[0].lstrip("# "))}</a></li>')
    body = f"<h1>The notebooks</h1>\n<p>With the outputs that are committed.</p>\n<ul>\n{chr(10).join(lines)}\n</ul>"
    return _page(home, home / "notebooks" / "index.html", "The notebooks", body)


def _api(home: Path) -> None:
    """The public names with their docstrings (pdoc)."""
    import pdoc
    import pdoc.render

    pdoc.render.configure(docformat="restructuredtext", search=False, math=False, show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of annotations inside pandas, which a table's display inherits
        pdoc.pdoc("kdiga_nb", "!kdiga_nb.cli", "!kdiga_nb.__main__", output_directory=home)
