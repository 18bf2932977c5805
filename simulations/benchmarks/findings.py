"""What the ready grids find: differences between their rows, seed by seed, on the phantom and on radiographs.

Runs `polyclinic sweep` on four of simulations/studies/grid-*.toml, and on each of them once more with radiographs and
their labels in place of invented patients. Each finding is the mean over seeds of a difference of two AUC, with its
95 % interval by Student's t. Two rules, rows or views are compared on the same test patients. Two partitions are not,
since every site draws its own, nor are sites; there the same difference in the row `pooled`, or of the untrained
encoder, says what the patients make of it. What is finished is not made again: hours on two cores for a whole run,
under --state, where each sweep leaves its page. Without --data only the phantom's half is made, and what --out holds of
the other stays.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from machine import RESULTS, describe, keep

from polyclinic_simulations.sweep.figures import FEDERATED, mean
from polyclinic_simulations.sweep.grid import SEED, read_grid
from polyclinic_simulations.sweep.run import Place, failures

STUDIES = Path(__file__).parents[1] / "studies"
PHANTOM, RADIOGRAPHS = "phantom", "nih-chestxray8-subset"
LABELS = '[evaluation.labels]\nnormal = ["No_findings"]\npneumonia = ["Pneumonia"]\n'
IN_ITS_STEAD = {r"phantom = \d+": f'cohort = "{RADIOGRAPHS}"', r"\[evaluation\.labels\]\n(.+\n)+": LABELS}
"""{in a ready grid: with radiographs}."""

BySeed = "pd.Series[float]"
Finding = tuple[str, BySeed]
"""(what is compared, a difference a seed)."""


def auc(rows: pd.DataFrame, row: str = FEDERATED, **axes: str) -> BySeed:
    """(seeds,) of a row's classifier on all sites' test patients, at these values of the axes on which it depends."""
    for column, value in {"row": row, "metric": "classifier_auc", "site": "", **axes}.items():
        rows = rows[rows[column] == value]
    return rows.groupby(SEED)["value"].mean()


def label_skew(rows: pd.DataFrame) -> Iterator[Finding]:
    """What skew costs the plain mean, and what each rule is above it under skew."""
    even, skewed = "iid", "dirichlet alpha=0.1"
    plain = {kind: auc(rows, rule="fedavg", partition=kind) for kind in (even, skewed)}
    pooled = {kind: auc(rows, "pooled", partition=kind) for kind in (even, skewed)}
    yield "fedavg: even labels above skewed ones", plain[even] - plain[skewed]
    yield "pooled: even labels above skewed ones", pooled[even] - pooled[skewed]
    yield "even: pooled above fedavg", pooled[even] - plain[even]
    yield "skewed: pooled above fedavg", pooled[skewed] - plain[skewed]
    for rule in others(rows["rule"], "fedavg"):
        yield f"skewed: {rule} above fedavg", auc(rows, rule=rule, partition=skewed) - plain[skewed]


def scanner_shift(rows: pd.DataFrame) -> Iterator[Finding]:
    """What the scanners cost each normalisation, and how each stands to averaged batch normalisation."""
    group, plain = "group norm", "batch norm, averaged"
    kinds = [plain, *others(rows["normalisation"], plain)]
    like, unlike = (
        {kind: auc(rows, normalisation=kind, severity=severity) for kind in kinds} for severity in ("0", "1")
    )
    loss = {kind: like[kind] - unlike[kind] for kind in kinds}
    for kind in kinds:
        yield f"{kind}: like scanners above differing ones", loss[kind]
    for kind in kinds[1:]:
        yield f"like scanners: {kind} above {plain}", like[kind] - like[plain]
        yield f"differing scanners: {kind} above {plain}", unlike[kind] - unlike[plain]
        yield f"{kind}: what it loses less than {plain}", loss[plain] - loss[kind]
    pooled = {
        kind: auc(rows, "pooled", normalisation=kind, severity="0")
        - auc(rows, "pooled", normalisation=kind, severity="1")
        for kind in (group, plain)
    }
    yield "pooled, group norm: like scanners above differing ones", pooled[group]
    yield "pooled, batch norm: like scanners above differing ones", pooled[plain]
    yield "pooled, group norm: what it loses less than batch norm", pooled[plain] - pooled[group]


def byzantine(rows: pd.DataFrame) -> Iterator[Finding]:
    """How each rule stands to the plain mean under each attack, and what the attack costs it."""
    unharmed, plain = "none", "fedavg"
    for attack in (unharmed, *others(rows["attack"], unharmed)):
        of_plain = auc(rows, rule=plain, attack=attack)
        for rule in others(rows["rule"], plain):
            yield f"{attack}: {rule} above {plain}", auc(rows, rule=rule, attack=attack) - of_plain
    for attack in others(rows["attack"], unharmed):
        for rule in (plain, *others(rows["rule"], plain)):
            before = auc(rows, rule=rule, attack=unharmed)
            yield f"{attack}, {rule}: without the attack above with it", before - auc(rows, rule=rule, attack=attack)


def held_out(rows: pd.DataFrame) -> Iterator[Finding]:
    """The gap between the sites that train and the one that does not: mean AUC at those, less its AUC.

    Of the classifier, fine-tuned on a part of their labels, and of a linear probe on the frozen encoder, which learns
    from all of them.
    """
    absent = "site-4"
    kinds = others(rows["views"], "")

    def at(metric: str, row: str, views: str, away: bool) -> BySeed:
        own = rows[(rows["metric"] == metric) & (rows["row"] == row) & (rows["views"] == views)]
        own = own[(own["site"] != "") & (own["label_fraction"] == 1)]
        return own[(own["site"] == absent) == away].groupby(SEED)["value"].mean()

    yield (
        "probe: gap of the untrained encoder",
        at("auc", "random", kinds[0], False) - at("auc", "random", kinds[0], True),
    )
    for what, metric in (("classifier", "classifier_auc"), ("probe", "auc")):
        for number, views in enumerate(kinds):
            inside, outside = (at(metric, FEDERATED, views, away) for away in (False, True))
            plain_inside, plain_outside = (at(metric, "scratch", views, away) for away in (False, True))
            gap, plain_gap = inside - outside, plain_inside - plain_outside
            if not number:  # the same whatever the views
                yield f"{what}: gap of supervised training alone", plain_gap
            yield f"{what}, {views}: gap with self-supervised pretraining", gap
            yield f"{what}, {views}: by how much pretraining narrows it", plain_gap - gap
            yield f"{what}, {views}: with pretraining above without, at the sites that train", inside - plain_inside
            yield f"{what}, {views}: with pretraining above without, at the site held out", outside - plain_outside


def others(values: "pd.Series[str]", but: str) -> list[str]:
    """An axis's values in the order of the file, but for one, and for the blank of rows that do not depend on it."""
    return [str(value) for value in values.unique() if value not in (but, "")]


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
    text = text[text.index("[study]") :]  # its first lines say what came out on the phantom
    for pattern, words in IN_ITS_STEAD.items():
        text, found = re.subn(pattern, words, text)
        assert found == 1, f"{ready} has {found} times {pattern}"
    copy = folder / ready.name
    copy.write_text(text)
    return copy


def sweep(grid: Path, out: Path, state: Path, data: Path | None) -> pd.DataFrame:
    """A sweep's results.csv; runs what is missing of it. A study that cannot be trained is a result as well."""
    command = [sys.executable, "-c", "from polyclinic.cli import main; main()", "sweep", str(grid)]
    command += ["--out", str(out), "--state", str(state), *(["--data", str(data)] if data else []), "--json"]
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    place, read = Place(out.absolute(), (data or grid.parent).absolute(), state.absolute()), read_grid(grid)
    failed = failures(read, place)
    unfinished = any(cell.name not in failed and not place.is_made(cell) for cell in read.cells)
    if unfinished or code not in (0, 1) or bool(code) != bool(failed):
        raise SystemExit(f"{grid}: the sweep was not finished, exit {code}; the same command goes on")
    return pd.read_csv(out / "results.csv", dtype={"severity": str}, keep_default_na=False, na_values={"value": [""]})


def found(rows: pd.DataFrame, compare: Callable[[pd.DataFrame], Iterator[Finding]]) -> dict[str, Any]:
    """{what is compared: mean, 95 % half-width (None of one seed) and the seeds' own}, of all that was measured."""
    found = {words: differences.dropna() for words, differences in compare(rows)}
    return {words: over_seeds(differences) for words, differences in found.items() if len(differences)}


def over_seeds(values: Iterable[float]) -> dict[str, Any]:
    """One figure a seed as its mean, 95 % half-width (None of one seed) and the seeds' own."""
    m = mean(values := list(values))
    half = None if math.isnan(m.half) else round(m.half, 3)
    return {"mean": round(m.value, 3), "half": half, "seeds": [round(v, 3) for v in values]}


def tables(findings: dict[str, dict[str, Any]]) -> str:
    """In markdown, a table a grid, a column a cohort: mean, and 95 % either way."""
    lines = []
    for name in GRIDS:
        found = {cohort: grids[name] for cohort, grids in findings.items() if name in grids}
        if found:
            lines += ["", f"| {name} | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
        for words in dict.fromkeys(words for grid in found.values() for words in grid):
            lines.append(f"| {words} | {' | '.join(in_words(grid.get(words)) for grid in found.values())} |")
    return "\n".join(lines)


def in_words(finding: dict[str, Any] | None, sign: str = "+") -> str:
    """Mean and half-width; with `sign` "-", a plus is not written."""
    if finding is None:
        return "–"
    return f"{finding['mean']:{sign}.3f}" + ("" if finding["half"] is None else f" ± {finding['half']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=Path(".polyclinic/findings"), help="where the sweeps work")
    parser.add_argument("--data", type=Path, help=f"the folder that holds {RADIOGRAPHS}")
    parser.add_argument("--out", type=Path, default=RESULTS / "findings.json")
    options = parser.parse_args()
    machine = describe()
    findings = json.loads(options.out.read_text())["findings"] if options.out.exists() else {}
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
