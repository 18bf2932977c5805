"""What one file may cost, checked before anything is decoded."""

MAX_BYTES = 1 << 30
"""Of a file."""
MAX_PIXELS = 1 << 26
"""Rows x columns of one image: 8192 x 8192."""
MAX_VOLUME = 1 << 29
"""Rows x columns x frames x samples of one file."""
MAX_FRAMES = 32
"""Images taken from a multi-frame file, evenly spaced: one long film must not outweigh the other patients."""
MAX_MEMORY = 8 << 30
"""Address space of a worker, bytes: a codestream may claim other sizes than its header."""
TIMEOUT_S = 120.0
"""For one file."""
MAX_TEXT = 64
"""Characters kept of a label, a site, a view, a scanner or a split."""
MAX_LABELS = 64
"""Labels of one image."""
MAX_CLASSES = 100
"""More sub-directories than this are not classes."""
