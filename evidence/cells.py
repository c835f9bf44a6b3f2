"""What the cells of evidence/grid.py say: the methods that are compared, and tables and a figure of their results.

A cell is a small file in ``results/``: what a run measured and, as hexadecimal digits, for every test image whether the
packed file's network is right, the first in the highest bit. Differences are in percentage points, with their 95 %
confidence interval, paired by image and, where two methods have several seeds in common, by seed.
"""

import json
from pathlib import Path

import numpy as np
import torch

from evidence.figures import panels
from evidence.stats import crossed_interval

METHODS = {**{name: f"search={name}" for name in (
    "uniform", "random", "greedy", "evolution", "sequential", "table", "null", "hirelc")},
    "untrained": "search=hirelc lla.timesteps=0",
    "trained": "search=hirelc lla.timesteps=10000 lla.envs=8 lla.standardize=true",
    "trained-long": "search=hirelc lla.timesteps=100000 lla.envs=8 lla.standardize=true"}
# the same with all channels kept
METHODS |= {f"{name}-bits": f"{METHODS[name]} compress.max_pruning=0" for name in ("table", "untrained", "trained")}
# Published accuracies of the same networks with small weights and FP32 activations: series, times smaller, percent.
LITERATURE = {"resnet20": [("trained ternary quantisation (Zhu et al. 2017)", 16, 91.13)],
              "resnet56": [("trained ternary quantisation (Zhu et al. 2017)", 16, 93.56)]}
# Networks as tables and figure call them, and the figure's series (up to their bracket) as it does.
TITLES = {"resnet20": "ResNet-20, CIFAR-10", "resnet56": "ResNet-56, CIFAR-10", "mobilenetv2": "MobileNetV2, half of "
          "Tiny ImageNet", "resnet18": "ResNet18, half of Tiny ImageNet", "deit_tiny": "DeiT-Tiny, CIFAR-100"}
SERIES = {"table": "table's optimum (--preset plus)", "greedy": "greedy by Fisher information", "uniform": "equal bits",
          "evolution": "evolution", "sequential": "sequential controller", "random": "random search",
          "given": "the network as given", "trained": "hierarchy, 10,000 steps", "hirelc": "hierarchy, 256 steps",
          "untrained": "hierarchy, untrained", "null": "null controller", "repaired longer": "repaired longer",
          "the README's command": "the README's command",
          "trained ternary quantisation": "published: ternary, Zhu et al. 2017"}
# The README's table: method → column.
COLUMNS = {"uniform": "equal bits", "untrained": "hierarchy, untrained", "trained": "trained", "greedy": "greedy",
           "table": "`--preset plus`"}


def read(folder) -> list[dict]:
    """Return the cells that a folder holds, in the order of their names, those of the networks as given among them.
    Files without a method are other results; ValueError for a method that is none of METHODS."""
    cells = {path: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    if unknown := [path.name for path, cell in cells.items() if cell.get("method", "given") not in {*METHODS, "given"}]:
        raise ValueError(f"{folder}: unknown methods in {', '.join(unknown)}")
    return [cell for cell in cells.values() if "method" in cell]


def digits(hit: torch.Tensor) -> str:
    """Return which test images are right, bool [n], as a cell's file holds it."""
    return np.packbits(hit.numpy()).tobytes().hex()


def hits(cell: dict) -> np.ndarray:
    """Return which test images a cell's packed file has right, uint8 [n]."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(cell["deployed_hits"]), np.uint8))[:cell["test_images"]]


def sizes(cells: list[dict]) -> list[tuple[str, int]]:
    """Return the networks of compressed cells, as TITLES orders them, and how many times smaller each is to be."""
    found = {(cell["network"], cell["times"]) for cell in cells if cell["method"] != "given"}
    return sorted(found, key=lambda size: (list(TITLES).index(size[0]), size[1]))


def grouped(cells: list[dict], network: str, times: int) -> dict[str, dict[int, dict]]:
    """Return the cells of a network and size, method → seed → cell; as ``given`` the network is the same for all."""
    of = {name: {cell["seed"]: cell for cell in cells if (cell["network"], cell["times"], cell["method"])
                 == (network, times, name)} for name in METHODS}
    given = [cell for cell in cells if (cell["network"], cell["method"]) == (network, "given")]
    return of | {"given": {seed: cell for cell in given for own in of.values() for seed in own}}


def accuracy(own: dict[int, dict]) -> float:
    """Return the accuracy of a method's packed files in percent, the mean over its seeds."""
    return 100 * np.mean([hits(cell) for cell in own.values()])


def difference(of: dict, name: str, reference: str) -> str:
    """Return by how many points a method is above another, and the interval; "" where no seed has both."""
    both = sorted(of[name].keys() & of[reference].keys())
    if name == reference or not both:
        return ""
    before, after = ([hits(of[side][seed]) for seed in both] for side in (reference, name))
    return "{:+.2f} [{:.2f}, {:.2f}]".format(*(round(x, 2) + 0.0 for x in crossed_interval(before, after)))  # no -0


def table(cells: list[dict], network: str, times: int, reference: str) -> str:
    """Return Markdown with a row per method that has cells of a network and size: the deployed accuracy in percent, and
    how far it is from that of ``reference``, or of the network as ``given``."""
    rows = [f"| {network}, file ÷ {times} | seeds | bytes | deployed | deployed - {reference}'s [95 %] | "
            "search, repair |", "|---" * 6 + "|"]
    of = grouped(cells, network, times)
    for name, own in ((name, of[name]) for name in METHODS if of[name]):
        size = np.mean([cell["packed_bytes"] for cell in own.values()])
        search, repair = (np.mean([sum(cell["timings"].get(part, 0) for part in parts) for cell in own.values()])
                          for parts in (("table", "sensitivity", "hla", "search", "target"), ("finetune", "deploy")))
        rows.append(f"| {name} | {' '.join(map(str, sorted(own)))} | {size:,.0f} | {accuracy(own):.2f} | "
                    f"{difference(of, name, reference)} | {search:.0f} s, {repair:.0f} s |")
    return "\n".join(rows)


def summary(cells: list[dict]) -> str:
    """Return Markdown with a row per network and size: deployed accuracies in percent, a star where they are of one
    seed, and how far the table's optimum is from greedy and from the network as given."""
    heads = ["network, data, as given", "FP32 file ÷", *COLUMNS.values(), "minus greedy", "minus as given"]
    rows, before = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"], ""
    for network, times in sizes(cells):
        of = grouped(cells, network, times)
        title = "" if network == before else f"{TITLES[network]}, {accuracy(of['given']):.2f}"
        found = [f"{accuracy(of[name]):.2f}{'*' * (len(of[name]) == 1)}" if of[name] else "" for name in COLUMNS]
        texts = [title, str(times), *found, *(difference(of, "table", other) for other in ("greedy", "given"))]
        rows.append("".join(f"| {text} " if text else "| " for text in texts) + "|")
        before = network
    return "\n".join(rows)


def learning(cells: list[dict]) -> str:
    """Return Markdown with a row per network and size that has trained and untrained policies: what 10,000 steps per
    agent and block change, means over the seeds, and how far the paper's 256 are from actions that are drawn."""
    heads = ["network, file ÷", "seeds", "R_acc = 0", "drop of the vote, of random actions",
             "reward of the vote, of random actions", "entropy ÷ a uniform policy's", "MSE, untrained → trained",
             "trained - untrained", "256 steps - drawn"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for network, times in sizes(cells):
        of = grouped(cells, network, times)
        seeds = sorted(of["trained"].keys() & of["untrained"].keys())
        if not seeds:
            continue
        low = [row for seed in seeds for row in of["trained"][seed]["searches"] if row["level"] == "LLA"]
        mean = {key: np.mean([row[key] for row in low], axis=0) for key in low[0] if key != "level"}
        mse = [np.mean([of[name][seed]["table"]["chosen"][-1]["table_mse"] for seed in seeds])
               for name in ("untrained", "trained")]
        rows.append(f"| {TITLES[network].partition(',')[0]}, {times} | {' '.join(map(str, seeds))} | "
                    f"{100 * mean['unseen']:.0f} % | {mean['consensus_drop']:.2f}, {mean['random_drop']:.2f} | "
                    f"{mean['consensus_reward']:,.0f}, {mean['random_reward']:,.0f} | {mean['entropy'][-1]:.2f} | "
                    f"{mse[0]:.1f} → {mse[1]:.1f} | {difference(of, 'trained', 'untrained')} | "
                    f"{difference(of, 'hirelc', 'null')} |")
    return "\n".join(rows)


def frontier(folder) -> list[dict]:
    """Return a folder's points of accuracy in percent against size: of its cells, of networks that were repaired longer
    and of what was published."""
    points = [(c["network"], c["method"], c["fp32_bytes"] / c["packed_bytes"], 100 * hits(c).mean())
              for c in read(folder)]
    points += [(name, *point) for name, own in LITERATURE.items() for point in own]
    places = *Path(folder).glob("long-*.json"), *Path(folder).glob("readme-*.json")
    longer = [json.loads(path.read_text()) for path in places]
    points += [(r["network"], r["series"], r["fp32_bytes"] / r["packed_bytes"], r["deployed_acc_full"]) for r in longer]
    return [{"network": name, "series": series, "times smaller": round(float(x), 2), "accuracy": round(float(y), 2)}
            for name, series, x, y in sorted(points)]


def figure(rows: list[dict]) -> str:
    """Return the frontier's points of the series in SERIES as an SVG of its own: a plot per network, means over the
    seeds."""
    plots, of = {title: [] for title in TITLES.values()}, {}
    for row in rows:
        of.setdefault((row["network"], row["series"].partition(" (")[0], round(row["times smaller"])), []).append(row)
    for (network, series, times), own in of.items():
        mean = {key: round(float(np.mean([row[key] for row in own])), 2) for key in ("times smaller", "accuracy")}
        if series in SERIES:
            level = {"times smaller": None} if times == 1 else {}  # the network as given
            plots[TITLES[network]].append({"series": SERIES[series], **mean, **level})
    plots = {title: own for title, own in plots.items() if own}
    drawn = panels("accuracy of the packed file against its size", plots, SERIES.values(), "times smaller", "accuracy",
                   ("FP32 file / packed file", "accuracy, %"))
    for name, style in (('class="grid"', 'stroke="#ddd"'), ('class="axis"', 'stroke="#000"'),
                        ("<svg ", '<svg style="background:#fff" font-family="sans-serif" font-size="12" ')):
        drawn = drawn.replace(name, style)
    return drawn
