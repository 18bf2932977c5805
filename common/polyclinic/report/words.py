"""How the report says numbers and names."""

from collections.abc import Mapping
from typing import Any

from polyclinic.faults import ANY_ROUND

METHODS = {
    "simclr": "SimCLR",
    "micle": "MICLe",
    "mlvicx": "MLVICX",
    "mae": "MAE",
    "sssd": "SSSD",
    "supervised": "fine-tuning",
}
ENCODERS = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "bit_resnet50": "BiT ResNet-50 v2",
    "vit_tiny": "ViT-Ti",
    "vit_small": "ViT-S",
    "vit_base": "ViT-B",
}
RULES = {
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "fedbn": "FedBN",
    "fedema": "FedEMA",
    "fedavgm": "FedAvgM",
    "fedadam": "FedAdam",
    "ldawa": "L-DAWA",
    "median": "the coordinate-wise median",
    "trimmed_mean": "the coordinate-wise trimmed mean",
    "krum": "Krum",
}
WEIGHTING = {"patients": "by patients", "equal": "equally", "tempered": "by the square root of patients"}
PRIVACY = {
    "none": "without differential privacy",
    "patient": "with differential privacy of every patient",
    "site": "with differential privacy of every site",
}
ROWS = {
    "random": "untrained encoder",
    "pixels": "16 × 16 pixels",
    "federated": "federated",
    "pooled": "all sites pooled",
    "alone": "every site alone",
    "scratch": "no pretraining",
    "init": "initial weights",
}
AGAINST = {"random": "an untrained encoder", "pixels": "16 × 16 pixels", "pooled": "pooling all images"}
ALONE = "alone:"


def row_name(row: str) -> str:
    """A row of the comparison in words."""
    return f"{row.removeprefix(ALONE)} alone" if row.startswith(ALONE) else ROWS.get(row, row)


def named(names: Mapping[str, str], key: str) -> str:
    """The name of `key`, or the key itself where no name is written down yet."""
    return names.get(key, key)


def count(number: float) -> str:
    """
    >>> count(12345)
    '12,345'
    """
    return f"{number:,.0f}"


def gain(difference: float) -> str:
    """
    >>> gain(0.0213), gain(-0.0213), gain(-0.0002)
    ('+0.021', '−0.021', '0.000')
    """
    return f"{difference:+.3f}".replace("-", "−") if round(difference, 3) else "0.000"


def of_shift(shift: Mapping[str, Any]) -> str:
    """
    >>> of_shift({"kind": "prevalence", "severity": 0.5, "value": "nodule", "becomes": ""})
    'prevalence 0.5 nodule'
    """
    value = " to ".join(filter(None, (shift["value"], shift["becomes"])))
    return f"{shift['kind']} {shift['severity']:g} {value}".strip()


def of_fault(fault: Mapping[str, Any]) -> str:
    """
    >>> of_fault({"kind": "lateness", "seconds": 600.0, "probability": 0.25, "rounds": (1, 1_000_000)})
    'lateness 600 s (0.25 of rounds)'
    >>> of_fault({"kind": "scaling", "factor": 10.0, "probability": 1.0, "rounds": (3, 5)})
    'scaling 10 (rounds 3 to 5)'
    """
    size = f" {fault['factor']:g}" if "factor" in fault else f" {fault['seconds']:g} s" if "seconds" in fault else ""
    first, last = fault["rounds"]
    when = [f"{fault['probability']:.3g} of rounds"] if fault["probability"] < 1 else []
    when += [f"rounds {first} to {last}"] if (first, last) != ANY_ROUND else []
    return f"{fault['kind']}{size}" + (f" ({', '.join(when)})" if when else "")


def absence(event: Mapping[str, Any]) -> str:
    """Why a simulated site's answer to a round is missing, of an event that says so; else "".

    >>> absence({"event": "site_late", "late_s": 7260.0}), absence({"event": "site_struck", "faults": ["dropout"]})
    ('answered 2 h 1 min late', 'dropped out')
    """
    if event["event"] == "site_late":
        return f"answered {duration(event['late_s'])} late"
    return "dropped out" if event["event"] == "site_struck" and "dropout" in event["faults"] else ""


def plural(number: int, thing: str) -> str:
    """
    >>> plural(1, "site"), plural(1200, "site")
    ('1 site', '1,200 sites')
    """
    return f"{count(number)} {thing}{'' if number == 1 else 's'}"


def size(bytes: float) -> str:
    """
    >>> size(1_530_000), size(0)
    ('1.53 MB', '0 B')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if bytes < 1000 or unit == "TB":
            break
        bytes /= 1000
    return f"{bytes:.3g} {unit}" if bytes < 1000 else f"{bytes:,.0f} {unit}"


def duration(seconds: float) -> str:
    """
    >>> duration(0.25), duration(12), duration(200), duration(7300)
    ('0.25 s', '12 s', '3 min 20 s', '2 h 1 min')
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def listed(names: list[str], most: int = 8) -> str:
    """
    >>> listed(["a", "b", "c"]), listed(list("abcdef"), most=3)
    ('a, b and c', 'a, b, c and 3 more')
    """
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
