"""Polyclinic: one medical-image encoder, trained across hospitals whose images never leave them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyclinic.artifacts import load_classifier as load_classifier
    from polyclinic.artifacts import load_encoder as load_encoder
    from polyclinic.artifacts import load_images as load_images

__version__ = "0.1.0"
__all__ = ["__version__", "load_classifier", "load_encoder", "load_images"]


def __getattr__(name: str) -> Any:
    """What `__all__` names, imported when first asked for: processes that decode images must not wait for torch."""
    if name in __all__:
        from polyclinic import artifacts

        return getattr(artifacts, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
