"""Polyclinic: one medical-image encoder, trained across hospitals whose images never leave them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyclinic.artifacts import load_encoder as load_encoder

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    """`load_encoder`, imported when first asked for: worker processes that decode images must not wait for torch."""
    if name == "load_encoder":
        from polyclinic.artifacts import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
