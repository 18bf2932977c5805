"""papers.html: every table with its mean over seeds, its published figures, and what has no figures yet."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from polyclinic.report.plots import RIGHT
from polyclinic.report.svg import Axis, dots, drawing, element, line, text, tick_text
from polyclinic_simulations.holdout_page import LINES, MEANING
from polyclinic_simulations.holdout_page import plot as by_fraction
from polyclinic_simulations.papers.goals import verdicts
from polyclinic_simulations.papers.plans import REFERENCES, STARTS, Plan, Tier
from polyclinic_simulations.sweep.figures import mean

ROW = 24
GROUP = ["dataset", "split", "regime", "method", "init", "label_fraction"]
STARTING = {"outside": "with outside images", "supervised": "from supervised weights"}
MEASURED = ("accuracy", "auc", "balanced_accuracy")
TITLES = {
    1: "Masked images with self-distillation (SSSD-COVID) on CT slices",
    2: "Two images of a patient (MICLe) after SimCLR",
    3: "Variance and covariance at several levels (MLVICX) on radiographs",
    4: "Labels that a new hospital needs (REMEDIS)",
    5: "Federated, alone, pooled",
}


def render_page(results: pd.DataFrame, without: Mapping[Plan, bool], tiers: Mapping[int, Tier]) -> str:
    """The page of `results` (papers.csv) and of the rows that are not in it.

    Args:
        without: the rows without figures, and of each whether it was run, and could not be measured.
        tiers: the settings of all, by table.
    """
    goals = verdicts(results, [plan for plan, run in without.items() if not run])
    unmade: dict[tuple[int, bool], list[str]] = {}
    for plan, run in without.items():
        unmade.setdefault((plan.table, run), []).append(plan.name.partition("-")[2])
    tables = [
        {
            "number": number,
            "title": title,
            "reference": REFERENCES[number],
            "goals": goals[number],
            "rows": summary(rows),
            "plot": plot(rows[rows["split"] != "site"]),
            "curves": curves(rows),
            "missing": {
                "Not run": unmade.get((number, False), []),
                "Not measurable (too few test patients, or an encoder that collapsed)": unmade.get((number, True), []),
            },
            "settings": in_words(tiers[number]),
            "machines": sorted(rows["machine"].unique()),
        }
        for number, title in TITLES.items()
        for rows in [results[results["table"] == number]]
    ]
    environment = Environment(
        loader=PackageLoader("polyclinic_simulations.papers", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    legend = [(meaning, LINES[start]) for start, meaning in MEANING.items()]
    return environment.get_template("page.html.j2").render(tables=tables, legend=legend)


def in_words(tier: Tier) -> str:
    """The encoder and the size of the images."""
    patch = f" with patches of {tier.encoder['patch']} px" if "patch" in tier.encoder else ""
    return f"{tier.encoder['name']}{patch}, images of {tier.images['size']} px"


def summary(rows: pd.DataFrame) -> list[dict[str, str]]:
    """One line for each group of seeds: mean, and its 95 % interval over them; of one seed there is none."""
    lines = []
    for key, group in rows.groupby(GROUP, sort=False):
        found = group[group["metric"].isin(MEASURED)]
        cells = {"name": label(dict(zip(GROUP, key, strict=True))), "seeds": str(group["seed"].nunique())}
        for metric, values in found.groupby("metric")["value"]:
            cells[str(metric)] = str(mean(values))
        cells["minutes"] = f"{group.drop_duplicates('seed')['seconds'].mean() / 60:.1f}"
        lines.append(cells)
    return lines


def label(key: dict[str, object]) -> str:
    """A row in words."""
    words = [str(key["dataset"]), f"{key['split']} split", f"{key['method']}, {key['regime']}"]
    words += [STARTING[str(key["init"])]] if key["init"] != "random" else []
    return ", ".join(words) + ("" if key["label_fraction"] == 1 else f", {key['label_fraction']:.0%} of labels")


def curves(rows: pd.DataFrame) -> list[tuple[str, Markup]]:
    """Of table 4, each hospital and its AUC against the fraction of its labels: mean, lowest and highest seed."""
    own = rows[(rows["split"] == "site") & (rows["metric"] == "auc")]
    named = own["dataset"] + own["init"].map({"random": ""}).fillna(f", {STARTING['supervised']}")
    seeds = own.assign(held_out=named).groupby(["held_out", "method", "label_fraction"], sort=False)["value"]
    means = seeds.agg(auc="mean", auc_low="min", auc_high="max").reset_index()
    means = means.assign(start=means["method"].map(STARTS), scope="held-out")
    return [(hospital, by_fraction(means, hospital)) for hospital in means["held_out"].unique()]


def plot(rows: pd.DataFrame, metric: str = "auc") -> Markup:
    """Each seed's value with its 95 % interval over patients, where it has one, row under row."""
    shown = rows[rows["metric"] == metric].astype({"low": float, "high": float})  # None, a mean's, becomes NaN
    if shown.empty:
        return Markup("")
    ends = shown[["low", "value", "high"]].to_numpy(float)
    axis = Axis(max(0.0, np.nanmin(ends) - 0.02), min(1.0, np.nanmax(ends) + 0.02), 210, RIGHT)
    groups = list(shown.groupby(GROUP, sort=False))
    several = shown["dataset"].nunique() > 1
    bottom = 8 + ROW * len(groups)
    marks = [line(axis.at(v), 8, axis.at(v), bottom, "grid") for v in axis.ticks()]
    marks += [text(axis.at(v), bottom + 15, tick_text(v), "middle") for v in axis.ticks()]
    marks.append(text((axis.start + axis.end) / 2, bottom + 30, "AUC; bars: 95 % over patients, one a seed", "middle"))
    for place, (key, group) in enumerate(groups):
        named = dict(zip(GROUP, key, strict=True))
        y = 8 + ROW * (place + 0.5)
        short = f"{named['method']}{'' if named['init'] == 'random' else ' + ' + str(named['init'])}, "
        if named["regime"] == "central":
            short += str(named["dataset"])
        else:
            short += str(named["dataset"]).partition("-")[0] if several else str(named["regime"])
        short += "" if named["label_fraction"] == 1 else f", {named['label_fraction']:.0%}"
        marks.append(text(axis.start - 10, y + 4, short if len(short) <= 32 else short[:31] + "…", "end"))
        for k, (_, seed) in enumerate(group.sort_values("seed").iterrows()):
            at = y + 5 * (k - (len(group) - 1) / 2)
            if seed[["low", "high"]].notna().all():
                marks.append(line(axis.at(seed["low"]), at, axis.at(seed["high"]), at, "whisker"))
            marks.append(element("path", d=dots([(axis.at(seed["value"]), at)]), class_="strip"))
    return drawing(bottom + 38, "AUC of every row", *marks)
