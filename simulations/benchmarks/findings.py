"""What the ready grids find: differences between their rows, seed by seed, on the phantom and on radiographs.

Runs `polyclinic sweep` on four of simulations/studies/grid-*.toml, and on each of them once more with radiographs in
place of invented patients and all else alike. Each finding is the mean over seeds of a difference of two AUC that were
measured on the same patients, with its 95 % interval by Student's t. What is finished is not made again: hours on two
cores for a whole run, under --state, where each sweep leaves its page. Without --data only the phantom's half is made.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from machine import RESULTS, describe, keep

from polyclinic_simulations.sweep.figures import FEDERATED, mean
from polyclinic_simulations.sweep.grid import SEED

STUDIES = Path(__file__).parents[1] / "studies"
PHANTOM, RADIOGRAPHS = "phantom", "nih-chestxray8-subset"
LABELS = '[evaluation.labels]\nnormal = ["No_findings"]\npneumonia = ["Pneumonia"]\n'
IN_ITS_STEAD = {r"phantom = \d+": f'cohort = "{RADIOGRAPHS}"', r"\[evaluation\.labels\]\n(.+\n)+": LABELS}
"""{in a ready grid: with radiographs}."""

BySeed = "pd.Series[float]"
Finding = tuple[str, BySeed]
"""(what is compared, a difference a seed)."""


def auc(rows: pd.DataFrame, row: str = FEDERATED, **axes: str) -> BySeed:
    """(seeds,) of a row's classifier on all sites' test patients, at these values of the axes."""
    for column, value in {"row": row, "metric": "classifier_auc", "site": "", **axes}.items():
        rows = rows[rows[column].isin([value, ""])]
    return rows.groupby(SEED)["value"].mean()


def label_skew(rows: pd.DataFrame) -> Iterator[Finding]:
    """What skew costs the plain mean, and what each rule is above it under skew."""
    even, skewed = "iid", "dirichlet alpha=0.1"
    plain = auc(rows, rule="fedavg", partition=skewed)
    yield "fedavg: even labels above skewed ones", auc(rows, rule="fedavg", partition=even) - plain
    for rule in rows["rule"].unique():
        if rule not in ("fedavg", ""):
            yield f"skewed: {rule} above fedavg", auc(rows, rule=rule, partition=skewed) - plain
    yield "skewed: pooled above fedavg", auc(rows, "pooled", partition=skewed) - plain


def scanner_shift(rows: pd.DataFrame) -> Iterator[Finding]:
    """What the scanners cost each normalisation, and how each stands to averaged batch normalisation."""
    plain = "batch norm, averaged"
    like, unlike = (
        {kind: auc(rows, normalisation=kind, severity=severity) for kind in rows["normalisation"].unique() if kind}
        for severity in ("0", "1")
    )
    for kind in like:
        yield f"{kind}: like scanners above differing ones", like[kind] - unlike[kind]
    for kind in (kind for kind in like if kind != plain):
        yield f"like scanners: {kind} above {plain}", like[kind] - like[plain]
        yield f"differing scanners: {kind} above {plain}", unlike[kind] - unlike[plain]
        yield f"{kind}: what it loses less than {plain}", unlike[kind] - like[kind] - unlike[plain] + like[plain]


def byzantine(rows: pd.DataFrame) -> Iterator[Finding]:
    """What an attack costs each rule."""
    for attack in ("sign flip", "100 times"):
        for rule in rows["rule"].unique():
            if rule:
                unharmed = auc(rows, rule=rule, attack="none")
                yield (
                    f"{attack}, {rule}: without the attack above with it",
                    unharmed - auc(rows, rule=rule, attack=attack),
                )


def held_out(rows: pd.DataFrame) -> Iterator[Finding]:
    """The gap between the sites that train and the one that does not, by a linear probe on the frozen encoder."""
    away = "site-4"
    at_sites = rows[(rows["metric"] == "auc") & (rows["site"] != "") & (rows["label_fraction"] == 1)]

    def at(row: str, views: str, outside: bool) -> BySeed:
        own = at_sites[(at_sites["row"] == row) & at_sites["views"].isin([views, ""])]
        return own[(own["site"] == away) == outside].groupby(SEED)["value"].mean()

    for place, views in enumerate(kind for kind in rows["views"].unique() if kind):
        inside, outside = at(FEDERATED, views, False), at(FEDERATED, views, True)
        supervised_inside, supervised_outside = at("scratch", views, False), at("scratch", views, True)
        gap, supervised_gap = inside - outside, supervised_inside - supervised_outside
        if place == 0:
            yield "gap of supervised training alone", supervised_gap
        yield f"{views}: gap with self-supervised pretraining", gap
        yield f"{views}: by how much pretraining narrows it", supervised_gap - gap
        yield f"{views}: with pretraining above without, at the sites that train", inside - supervised_inside
        yield f"{views}: with pretraining above without, at the site held out", outside - supervised_outside


GRIDS: dict[str, Callable[[pd.DataFrame], Iterator[Finding]]] = {
    "label-skew": label_skew,
    "scanner-shift": scanner_shift,
    "byzantine": byzantine,
    "held-out": held_out,
}


def grid_for(name: str, cohort: str, folder: Path) -> Path:
    """The ready grid; of radiographs, a copy in `folder`."""
    ready = STUDIES / f"grid-{name}.toml"
    if cohort == PHANTOM:
        return ready
    text = ready.read_text()
    for pattern, words in IN_ITS_STEAD.items():
        text, found = re.subn(pattern, words, text)
        assert found == 1, f"{ready} has {found} times {pattern}"
    copy = folder / ready.name
    copy.write_text(text)
    return copy


def sweep(grid: Path, out: Path, state: Path, data: Path | None) -> pd.DataFrame:
    """A sweep's results.csv; runs what is missing of it."""
    command = [sys.executable, "-c", "from polyclinic.cli import main; main()", "sweep", str(grid)]
    command += ["--out", str(out), "--state", str(state), *(["--data", str(data)] if data else []), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return pd.read_csv(out / "results.csv", dtype={"severity": str}, keep_default_na=False, na_values={"value": [""]})


def found(rows: pd.DataFrame, compare: Callable[[pd.DataFrame], Iterator[Finding]]) -> dict[str, Any]:
    """{what is compared: mean, 95 % half-width and the seeds' own}."""
    figures = {}
    for words, differences in compare(rows):
        m = mean(differences)
        figures[words] = {
            "mean": round(m.value, 3),
            "half": round(m.half, 3),
            "seeds": [round(v, 3) for v in differences],
        }
    return figures


def tables(findings: dict[str, dict[str, Any]]) -> str:
    """In markdown, a table a grid, a column a cohort: mean, and 95 % either way."""
    lines = []
    for name in GRIDS:
        found = {cohort: grids[name] for cohort, grids in findings.items() if name in grids}
        if found:
            lines += ["", f"| {name} | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
        for words in next(iter(found.values()), {}):
            figures = [f"{grid[words]['mean']:+.3f} ± {grid[words]['half']:.3f}" for grid in found.values()]
            lines.append(f"| {words} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path(".polyclinic/findings"), help="where the sweeps work")
    parser.add_argument("--data", type=Path, help=f"the folder that holds {RADIOGRAPHS}")
    parser.add_argument("--out", type=Path, default=RESULTS / "findings.json")
    options = parser.parse_args()
    machine, findings = describe(), {}
    for cohort in [PHANTOM, *([RADIOGRAPHS] if options.data else [])]:
        place = options.state / cohort
        place.mkdir(parents=True, exist_ok=True)
        for name, compare in GRIDS.items():
            data = options.data.absolute() if cohort == RADIOGRAPHS else None
            rows = sweep(grid_for(name, cohort, place), place / name, options.state / "state", data)
            findings.setdefault(cohort, {})[name] = found(rows, compare)
    keep(options.out, machine, {"findings": findings})
    print(tables(findings))


if __name__ == "__main__":
    main()
