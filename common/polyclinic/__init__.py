"""Polyclinic: one medical-image encoder, trained across hospitals whose images never leave them."""

__version__ = "0.1.0"
