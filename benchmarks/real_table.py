"""The runs that `bench_real` keeps in its figures, and what it says of them: table and plot.

Keys: ``figure/split/file/seed/kind/rates`` of a run, ``figure/split/kind`` of what is said of a kind at its best rates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

from transformers import AutoConfig

from fl_split.config import RunConfig
from fl_split.plan.plan import make_plan

BATCH, MAX_LENGTH = 8, 80
Figures = dict[str, float]


def alone(split: str) -> str:
    """The kind that trains nothing but the top of a split."""
    return f"none-{split.split('+')[1]}"


def where(split: str, kind: str) -> str:
    """Under which split a kind's runs are kept: some are the same in all."""
    return "any" if kind == "all" or kind.startswith("none-") else split


@dataclass(frozen=True)
class Runs:
    """All runs of a model so far."""

    model: Path
    file: str  # of the institution on which rates are swept
    figures: Mapping[str, Any]

    @property
    def ran(self) -> list[tuple[str, str]]:
        """Splits, or ``any``, and the kinds that ran in them."""
        keys = (key.split("/") for key in self.figures)
        return sorted({(at[1], at[4]) for at in keys if len(at) == 6 and at[0] == "heldout-loss"})

    def best_rates(self, split: str, kind: str) -> str:
        """Of a kind's rates, those of the lowest loss on the first file and seed; empty: none was run."""
        prefix = f"heldout-loss/{where(split, kind)}/{self.file}/0/{kind}/"
        tried = [(loss, key.removeprefix(prefix)) for key, loss in self.figures.items() if key.startswith(prefix)]
        return min(tried, default=(0.0, ""))[1]

    def of(self, split: str, kind: str) -> dict[str, Figures]:
        """A kind's runs at its best rates: figures by file and seed."""
        found: dict[str, Figures] = {}
        rates = self.best_rates(split, kind)
        for key, value in self.figures.items():
            name, *at = key.split("/")
            if len(at) == 5 and at[0] == where(split, kind) and at[3:] == [kind, rates]:
                found.setdefault(f"{at[1]}/{at[2]}", {})[name] = value
        return found

    def costs(self, split: str, kind: str) -> tuple[float, float]:
        """MB of weights and training on a node, as `fl-split plan` has them, and MB sent and got in a full step."""
        name, _, count = kind.removeprefix("tried-").partition("-")
        bottom, top = map(int, split.split("+"))
        values = {
            "split.bottom-layers": bottom,
            "split.top-layers": int(count) if name == "none" else top,
            "surrogate.kind": {"matched": "blocks", "all": "identity", "probes": "identity"}.get(name, name),
            "surrogate.layers": int(count or 2),
            "trunk.exact-gradient": name == "exact",
            "trunk.share-address": "embedded" if name == "shares" else "",
            "data.max-length": MAX_LENGTH,
            "train.batch-size": BATCH,
        }
        plan = make_plan(AutoConfig.from_pretrained(self.model), RunConfig.from_flat(values))
        if name == "all":
            layers = (bottom + top + plan.trunk_layers) / (bottom + top)
            return (plan.full_weights + layers * plan.node.training) / 1e6, 0.0
        replies = 1 + int(count) / 2 if name == "probes" else 1  # differences, one byte each
        return (plan.node.weights + plan.node.training) / 1e6, (plan.request_bytes + replies * plan.reply_bytes) / 1e6

    def summary(self, split: str, kind: str) -> Figures:
        """What is said of a kind in a split, without the split's and the kind's names."""
        own, none, exact = (self.of(split, name) for name in (kind, alone(split), "exact"))
        (memory, sent), (base_memory, base_sent) = (self.costs(split, name) for name in (kind, alone(split)))
        names = ("heldout-loss", "share-leak-bits", *(f"cosine-{when}" for when in ("start", "middle", "end")))
        said = {
            name: mean(numbers) for name in names if (numbers := [run[name] for run in own.values() if name in run])
        }
        asked = [run["step-s-recorded"] for run in none.values() if run.get("step-s-recorded", 0) > 0]
        seconds = [run["step-s"] - run.get("step-s-recorded", 0) for run in own.values()]
        said["step-s"] = mean(seconds) + (
            mean(asked) if kind.startswith("none") and asked else 0
        )  # as if each had asked
        said |= {"runs": len(own), "node-mb": memory, "step-mb": sent}
        said |= {"memory-ratio": memory / base_memory, "bytes-ratio": sent / base_sent}
        if common := none.keys() & exact.keys() & own.keys():
            gain, whole = (
                sum(none[r]["heldout-loss"] - runs[r]["heldout-loss"] for r in common) for runs in (own, exact)
            )
            said |= {"loss-won": gain / len(common), "gap-closed": gain / whole}
        return said

    def table(self) -> Figures:
        """Print a row per split and kind, at its best rates; return what is said in it."""
        said: Figures = {}
        for split in sorted({split for split, _ in self.ran} - {"any"}):
            print(
                f"{split}: kind, rates, runs, held-out loss, gap closed, cosine at start, middle, end, MB, MB a step, s"
            )
            rows = {kind: self.summary(split, kind) for at, kind in self.ran if at in (split, "any")}
            for kind, row in sorted(rows.items(), key=lambda item: -item[1]["heldout-loss"]):
                for name, value in row.items():
                    what, _, when = name.partition("-") if "cosine" in name else (name, "", "")
                    said["/".join(filter(None, (what, split, kind, when)))] = value
                cosines = " / ".join(f"{value:.3f}" for name, value in row.items() if "cosine" in name)
                print(
                    f"  {kind:10} {self.best_rates(split, kind):10} {row['runs']}  {row['heldout-loss']:.4f}  "
                    f"{row.get('gap-closed', 0):6.2f}  {cosines:21}  {row['node-mb']:6.0f}  {row['step-mb']:5.2f}  "
                    f"{row['step-s']:5.2f}"
                )
        return said

    def plot(self, first_split: str, out: Path) -> None:
        """Loss against memory and bytes: of all splits' kinds, less that of a split's top alone, on common runs."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        base = alone(first_split)
        alone_runs = self.of(first_split, base)
        points: dict[str, list[tuple[str, float, float, float]]] = {}
        for split, kind in self.ran:
            at = first_split if split == "any" else split
            runs = self.of(at, kind)
            if common := runs.keys() & alone_runs.keys():
                won = [runs[run]["heldout-loss"] - alone_runs[run]["heldout-loss"] for run in common]
                points.setdefault(split, []).append((kind, *self.costs(at, kind), mean(won)))
        figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
        labels = ("weights and training on the node, MB", "MB on the wire, a step")
        for place, (axes, label) in enumerate(zip(panels, labels, strict=True)):
            for (split, found), marker in zip(points.items(), "osD^vP", strict=False):
                axes.scatter([p[1 + place] for p in found], [p[3] for p in found], marker=marker, label=split)
            width, height = (high - low for low, high in (axes.get_xlim(), axes.get_ylim()))
            near: dict[tuple[int, int], tuple[tuple[float, float], list[str]]] = {}  # points of one label
            for kind, *costs, loss in chain(*points.values()):
                cell = round(25 * costs[place] / width), round(40 * loss / height)
                near.setdefault(cell, ((costs[place], loss), []))[1].append(kind)
            for at_point, kinds in near.values():
                text = "\n".join(dict.fromkeys(kinds))
                axes.annotate(text, at_point, xytext=(5, 3), textcoords="offset points", fontsize=7)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"held-out loss, less that of {base}")
        panels[0].legend(title="bottom + top")
        figure.savefig(out, dpi=120)
