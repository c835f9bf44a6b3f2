"""What the documentation names exists, its commands are ones that the program takes, and its Python runs."""

import importlib
import re
import shlex

import pytest
import torch
from torch import nn

from config import EXPERIMENTS
from evidence.readme import ROOT, made
from support.cli import arguments

PAGES = {ROOT / name: (ROOT / name).read_text(encoding="utf-8")
         for name in ("README.md", "docs/GUIDE.md", "docs/RESULTS.md", "docs/LEDGER.md")}
README, GUIDE, _, LEDGER = PAGES.values()


def test_made_parts_are_as_the_command_writes_them_and_tables_are_whole():
    assert (texts := made()) == {name: (ROOT / name).read_text(encoding="utf-8") for name in texts} and len(texts) == 5
    assert re.findall(r"^\| (\d) \| (.*?) \| (.*?) → (.*?) \| (.*?) \| (.*?) \|", README, re.M) == [
        (str(e.number), e.title, *(f"{x:.2f}" for x in (e.paper.baseline, e.paper.final, e.paper.drop, e.paper.cr)))
        for e in EXPERIMENTS.values()]
    assert re.findall(r"^\| D(\d+) \|", LEDGER, re.M) == [str(n) for n in range(1, 21)]


def test_the_map_from_equation_to_function_to_test_names_what_exists():
    rows = [line.split("|") for line in README.splitlines() if re.match(r"\|.*`test_\w+\.py::", line)]
    for _, _, code, tests, _ in rows:
        assert all(hasattr(importlib.import_module(m), name) for m, name in re.findall(r"`(\w+)\.(\w+)`", code)), code
        source = (ROOT / "tests" / re.search(r"test_\w+\.py", tests)[0]).read_text(encoding="utf-8")
        assert all(f"def {name}(" in source for name in re.findall(r"(test_\w+)`", tests)), tests
    assert len(rows) >= 20


def test_commands_and_settings_are_accepted(monkeypatch):
    monkeypatch.setattr("os.path.isfile", lambda _: True)  # net.py is the reader's
    commands = [shlex.split(line, comments=True) for line in re.findall(r"python hirelc\.py ([^`\n]*)", README + GUIDE)]
    commands += [["--exp", "4", *line.split()] for line in re.findall(r"`(--name \S+ --set [^`]*)`", GUIDE)]
    assert len(commands) >= 25 and all(args.list or configs for args, configs in map(arguments, commands))


def test_links_lead_somewhere():
    heads = {page: re.sub(r"[^\w\n# -]", "", text.lower()).replace(" ", "-") for page, text in PAGES.items()}
    for page, text in PAGES.items():
        for path, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!https?:)(.*?)\)", text)):
            target = page.parent / path if path else page
            assert target.exists() and (not anchor or f"#-{anchor}\n" in heads[target]), (page, path, anchor)


@pytest.mark.parametrize("page", list(PAGES)[:2], ids=["readme", "guide"])
def test_the_python_on_a_network_of_ones_own_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y, layers = torch.rand(24, 3, 16, 16), torch.arange(24) % 3, [nn.Conv2d(n, 16, 3, 2, 1) for n in (3, 16, 16, 16)]
    names = dict(train=(x, y), test=(x, y), example=x, model=nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)))
    section = re.search(r"^## (?:Compress a|A) network of your own\n(.*?)(?=^## )", PAGES[page], re.M | re.S)[1]
    for block in re.findall(r"```python\n(.*?)```", section, re.S):
        exec(compile(block, str(page), "exec"), names)
    assert names["result"]["coverage"] == 1.0
