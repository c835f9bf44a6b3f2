"""Parts of the documentation that are made of others: ``python -m evidence.readme`` writes them again.

README.md: its blocks ``<!-- figures NAME -->`` … ``<!-- /figures -->`` are those of docs/RESULTS.md. docs/GUIDE.md: its
block ``<!-- settings -->`` … ``<!-- /settings -->`` is the table of config.py's fields.
"""

from __future__ import annotations

import re
from pathlib import Path

from config import Config, fields_of, get
from support.files import write_text

ROOT = Path(__file__).resolve().parent.parent
FIGURES = re.compile(r"(<!-- figures (\w+) -->\n)(.*?)(<!-- /figures -->)", re.S)
SETTINGS = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.S)


def with_figures(readme: str, results: str) -> str:
    """Return the README with its figures taken from the results page, links to that page's sections mended."""
    blocks = {match[2]: match[3] for match in FIGURES.finditer(results)}
    moved = {name: re.sub(r"\]\((?!https?:)(\w+\.md)?", lambda m: f"](docs/{m[1] or 'RESULTS.md'}", text)
             for name, text in blocks.items()}
    return FIGURES.sub(lambda match: match[1] + moved[match[2]] + match[4], readme)


def settings_table() -> str:
    """Return a Markdown table of every setting: key, default, allowed values or range, help."""
    rows = ["| setting | default | allowed | what it is |", "|---|---|---|---|"]
    for key, item in fields_of(Config()).items():
        default, about = get(Config(), key), item.metadata
        default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        default = default.lower() if default in ("True", "False") else default
        low, high = (about[end] for end in ("low", "high"))
        allowed = ", ".join(about["choices"] or ()) or (
            "" if low is None else f"{low:,} or more" if high is None else f"{low:,} to {high:,}")
        rows.append(f"| `{key}` | {default} | {allowed} | {about['help'].replace('|', ' ')} |")
    return "\n".join(rows) + "\n"


def made() -> dict[str, str]:
    """Return the pages with their made parts as they should be: path below the root → text."""
    readme, guide, results = ((ROOT / name).read_text(encoding="utf-8")
                              for name in ("README.md", "docs/GUIDE.md", "docs/RESULTS.md"))
    return {"README.md": with_figures(readme, results),
            "docs/GUIDE.md": SETTINGS.sub(lambda _: settings_table(), guide)}


if __name__ == "__main__":
    for page, text in made().items():
        write_text(ROOT / page, text)
