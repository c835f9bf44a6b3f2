"""``python -m evidence.readme`` writes the parts of the documentation that are made of others: the frontier's tables in
docs/RESULTS.md and its figure from results/, README.md's blocks ``<!-- figures NAME -->`` from docs/RESULTS.md,
docs/GUIDE.md's ``<!-- settings -->`` from config.py."""

import re
from pathlib import Path

from config import Config, fields_of, get
from evidence.cells import figure, frontier, learning, read, sizes, summary, table
from evidence.report import csv_of
from support.files import replace_file

ROOT, PAGES = Path(__file__).resolve().parent.parent, ("README.md", "docs/GUIDE.md", "docs/RESULTS.md")
FIGURES = re.compile(r"(<!-- figures (\w+) -->\n)(.*?)(<!-- /figures -->)", re.S)
SETTINGS = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.S)


def with_figures(readme: str, results: str) -> str:
    """Return the README with its figures taken from the results page, links to that page's sections mended."""
    blocks = {match[2]: match[3] for match in FIGURES.finditer(results)}
    return FIGURES.sub(lambda match: match[1] + re.sub(
        r"\]\((?!https?:)(\w+\.md)?", lambda m: f"](docs/{m[1] or 'RESULTS.md'}", blocks[match[2]]) + match[4], readme)


def settings_table() -> str:
    """Return a Markdown table of every setting: key, default, allowed values or range, help."""
    rows = ["| setting | default | allowed | what it is |", "|---|---|---|---|"]
    for key, item in fields_of(Config()).items():
        default, about = get(Config(), key), item.metadata
        default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        default = default.lower() if default in ("True", "False") else default
        ends = [f"{about[end]:,}" for end in ("low", "high") if about[end] is not None]
        allowed = ", ".join(about["choices"] or ()) or " to ".join(ends) + " or more" * (len(ends) == 1)
        rows.append(f"| `{key}` | {default} | {allowed} | {about['help'].replace('|', ' ')} |")
    return "\n".join([*rows, ""])


def with_tables(page: str, tables: list[str]) -> str:
    """Return a page with tables in the place of those that begin with the same line.

    Raises ValueError where the page has none.
    """
    for text in tables:
        head = text.partition("\n")[0]
        page, found = re.subn(rf"^{re.escape(head)}(\n\|.*)*", lambda _: text, page, flags=re.M)
        if not found:
            raise ValueError(f"docs/RESULTS.md: no table begins with {head!r}; write that line where it should stand")
    return page


def made() -> dict[str, str]:
    """Return the files with made parts as they should be: path below the root → text."""
    readme, guide, results = ((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    cells, points = read(ROOT / "results"), frontier(ROOT / "results")
    tables = [summary(cells), learning(cells), *(table(cells, *size, "table") for size in sizes(cells))]
    results = with_tables(results, tables)
    texts = with_figures(readme, results), SETTINGS.sub(lambda _: settings_table(), guide), results
    return dict(zip(PAGES, texts)) | {"results/frontier.csv": csv_of(points), "docs/frontier.svg": figure(points)}


if __name__ == "__main__":
    for page, text in made().items():
        replace_file(ROOT / page, text.encode())
