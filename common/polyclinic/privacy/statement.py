"""What a study promises about privacy, in one exact paragraph, and all that leaves a site with what covers it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from polyclinic.study import NoPrivacy, PatientPrivacy, SitePrivacy, Study

NONE = (
    "No differential privacy was applied: no epsilon can be stated, and weights can tell something about the images "
    "they were trained on."
)
LISTED = 8
"""Sites that the paragraph names one by one."""
OUTSIDE = (
    "that a site takes part, how long it takes, and how many patients it has, which is taken as public; the choice "
    "that a coordinator makes among studies and their models"
)


@dataclass(frozen=True)
class Release:
    """Something that leaves a site, and how it is covered."""

    quantity: str
    cover: str


def statement(study: Study, epsilons: Mapping[str, float | None]) -> str:
    """The paragraph of report and model card: unit, relation, epsilon, mechanism, sampling, composition, trust, gaps.

    Args:
        epsilons: {site: what the study has spent there at its delta}; None where nobody has said it.
    """
    privacy = study.privacy
    if isinstance(privacy, NoPrivacy):
        return NONE
    spent = _spent(epsilons, privacy.delta)
    return _of_patients(privacy, spent) if isinstance(privacy, PatientPrivacy) else _of_sites(privacy, spent)


def _of_patients(privacy: PatientPrivacy, spent: str) -> str:
    return (
        f"Differential privacy of every patient, made at the sites. Unit: a patient of a site with all images there; "
        f"relation: adding or removing one. The updates that a site has sent in this study are (epsilon, "
        f"delta)-differentially private with {spent}, as each site has said in its last answer; what a round cost that "
        f"it did not finish in time stands in its own ledger. Mechanism: DP-SGD; a step reads one random image of each "
        f"patient that is drawn, clips each patient's gradient to a norm of {privacy.clip:g} over all trained "
        f"weights, adds Gaussian noise of standard deviation {privacy.noise * privacy.clip:g} (noise "
        f"{privacy.noise:g} times clip) to their sum and divides by the expected number of patients. Sampling: "
        f"Poisson, each patient by itself in every step with the rate expected batch / patients, from the operating "
        f"system's randomness. Composition: Rényi differential privacy over all steps, rounds and stages of this "
        f"study; over all its studies each site's own ledger composes, and no figure of this study says what its "
        f"patients have spent in all. Trust: none in the coordinator, which sees updates with their noise in them. "
        f"Not covered: a patient who is seen at two sites, whose epsilons add up; {OUTSIDE}."
    )


def _of_sites(privacy: SitePrivacy, spent: str) -> str:
    return (
        f"Differential privacy of every site, made at the coordinator. Unit: a site with all its patients; relation: "
        f"adding or removing what it sends, the number of enrolled sites being public. The global weights after all "
        f"rounds together are (epsilon, delta)-differentially private with {spent}. Mechanism: each update is clipped "
        f"as a whole to a norm of {privacy.clip:g}, Gaussian noise of standard deviation "
        f"{privacy.noise * privacy.clip:g} (noise {privacy.noise:g} times clip) is added to their sum, and that is "
        f"divided by the number of enrolled sites. Sampling: none; every site counts as being in every round. "
        f"Composition: Rényi differential privacy over all rounds of this study; nobody composes over studies, and "
        f"the epsilons of several with the same sites add up. Trust: the coordinator is trusted, since it sees "
        f"updates bare; the promise holds towards all who see global weights only. Not covered: what the coordinator "
        f"itself sees; a patient who is seen at two sites, whose epsilons add up; {OUTSIDE}."
    )


def rounded_up(epsilon: float) -> str:
    """Three decimals, never below the value.

    >>> rounded_up(1.2341)
    '1.235'
    """
    return f"{math.ceil(epsilon * 1000) / 1000:.3f}"


def _spent(epsilons: Mapping[str, float | None], delta: float) -> str:
    """The epsilons of all sites at one delta, in words."""
    known = {site: value for site, value in sorted(epsilons.items()) if value is not None}
    silent = sorted(epsilons.keys() - known.keys())
    values = {rounded_up(value) for value in known.values()}
    if not known:
        return f"an epsilon that no site has said yet, at delta = {delta:g}"
    if len(values) == 1 and not silent:
        words = f"epsilon = {values.pop()} at every site"
    elif len(known) <= LISTED:
        words = "epsilon = " + ", ".join(f"{rounded_up(value)} at {site}" for site, value in known.items())
    else:
        low, high = (rounded_up(bound(known.values())) for bound in (min, max))
        words = f"epsilon from {low} to {high} at {len(known)} sites"
    if not silent:
        return f"{words}, at delta = {delta:g}"
    who = ", ".join(silent) if len(silent) <= LISTED else f"{len(silent)} sites"
    return f"{words}, at delta = {delta:g}; nothing is known of {who}"


def released(study: Study) -> list[Release]:
    """Every quantity that leaves a site during a study under differential privacy, and how each is covered."""
    if isinstance(study.privacy, NoPrivacy):
        return []
    return [
        *(_FROM_PATIENTS if isinstance(study.privacy, PatientPrivacy) else _FROM_SITES),
        Release("number of patients", "not sent: 1 stands in its place, and all sites weigh the same"),
        Release("losses, probes, all other figures", "withheld; the coordinator drops unseen what comes all the same"),
        Release("normalisation of pixels", "fixed constants, not computed from patients"),
        Release("how long a round takes", "not covered: it tells of the machine and of the number of patients"),
        Release("that it takes part, or why it cannot", "not covered; the reason is a short line without path or name"),
        Release("its version, clock and approval", "nothing of patients is in them"),
    ]


_FROM_PATIENTS = (
    Release("change of the weights", "clipped patient by patient, with noise in it before it leaves"),
    Release("epsilon spent, head of the ledger", "follow from noise, steps and number of patients, which is public"),
    Release("early stopping, class weights", "off: patients would decide them without noise"),
    Release("initial weights", "public"),
    Release("patients drawn, views, noise", "not sent; random numbers of the site, not of the study's seed"),
)
_FROM_SITES = (
    Release("change of the weights", "bare to the coordinator; in the global weights clipped and with noise"),
    Release("early stopping", "off: no figure comes by which to stop"),
    Release("initial weights, views", "public: they follow from the study"),
    Release("noise", "not sent; from the operating system, not of the study's seed"),
)
