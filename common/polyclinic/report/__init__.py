"""report.html and MODEL_CARD.md, from the files of a run directory only."""

from polyclinic.report.pictures import embedding_table, save_views_figure
from polyclinic.report.render import render_report

__all__ = ["embedding_table", "render_report", "save_views_figure"]
