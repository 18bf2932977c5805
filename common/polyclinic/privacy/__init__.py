"""Differential privacy of patients: DP-SGD that wraps the training loop, what it spends, and the ledger of that.

The unit is the patient and the relation is adding or removing one with all images; sites' own caps, the composition
over rounds and studies, and the ledger that holds both stand in `ledger`, the arithmetic in `accounting`.
"""
