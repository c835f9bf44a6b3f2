"""What the README names exists, and its commands are ones that the program takes."""

import importlib
import re
from pathlib import Path

import pytest

import hirelc
from config import Config, override

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_from_equation_to_function_to_test_names_what_exists():
    rows = [line for line in README.splitlines() if re.match(r"\| .*`\w+\.\w+.*`test_\w+\.py::", line)]
    assert len(rows) >= 20
    for row in rows:
        _, _, code, tests, _ = row.split("|")
        for name in re.findall(r"`([\w.]+)`", code):
            owner = importlib.import_module(name.split(".")[0])
            for part in name.split(".")[1:]:
                owner = getattr(owner, part)
        source = ""
        for file, name in re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", tests):
            source = (ROOT / "tests" / file).read_text(encoding="utf-8") if file else source
            assert f"def {name}(" in source, name


def test_commands_of_the_experiments_and_ablations_are_accepted():
    commands = re.findall(r"`python hirelc\.py (--exp .*?)`", README)
    assert {f"--exp {n}" for n in range(1, 8)} <= set(commands)
    for command in commands:
        args = hirelc._parser().parse_args(command.split())
        for exp in args.exp:
            hirelc.resolve(exp, {}, args.set)
    settings = re.findall(r"`--name \S+ --set (\S+)`", README)
    assert len(settings) >= 7
    for setting in settings:
        assert override(Config(), [setting]) != Config() or setting == "carry=none"


@pytest.mark.parametrize("mark", [f"D{n}" for n in range(1, 21)])
def test_the_ledger_is_whole(mark):
    assert f"| {mark} |" in README
