"""Rehearse a consortium on one machine."""
