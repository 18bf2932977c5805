"""Probes on a frozen encoder, always split by patient, and the figures that tell whether it has collapsed."""

from polyclinic.evaluation.encoding import features, pixel_features
from polyclinic.evaluation.health import COLLAPSED_RANK, COLLAPSED_SPREAD, collapsed, health
from polyclinic.evaluation.labels import NotMeasurable, classes_of
from polyclinic.evaluation.probes import knn_probe, linear_probe
from polyclinic.evaluation.scores import Scores
from polyclinic.evaluation.split import split_patients

__all__ = [
    "COLLAPSED_RANK",
    "COLLAPSED_SPREAD",
    "NotMeasurable",
    "Scores",
    "classes_of",
    "collapsed",
    "features",
    "health",
    "knn_probe",
    "linear_probe",
    "pixel_features",
    "split_patients",
]
