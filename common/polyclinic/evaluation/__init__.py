"""Probes on a frozen encoder, scores of a classifier, signs of collapse; always split by patient."""

from polyclinic.evaluation.classifier import ClassifierScores, classifier_scores, score_classifier
from polyclinic.evaluation.encoding import features, pixel_features
from polyclinic.evaluation.health import COLLAPSED_RANK, COLLAPSED_SPREAD, alignment, collapsed, health
from polyclinic.evaluation.labels import NotMeasurable, classes_of, measurable_classes, targets_of, unmapped
from polyclinic.evaluation.probes import Probe, knn_probe, learn_probe, linear_probe
from polyclinic.evaluation.scores import Scores
from polyclinic.evaluation.split import labelled_patients, split_patients

__all__ = [
    "COLLAPSED_RANK",
    "COLLAPSED_SPREAD",
    "ClassifierScores",
    "NotMeasurable",
    "Probe",
    "Scores",
    "alignment",
    "classes_of",
    "classifier_scores",
    "collapsed",
    "features",
    "health",
    "knn_probe",
    "labelled_patients",
    "learn_probe",
    "linear_probe",
    "measurable_classes",
    "pixel_features",
    "score_classifier",
    "split_patients",
    "targets_of",
    "unmapped",
]
