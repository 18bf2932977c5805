"""report.html and MODEL_CARD.md, from the files of a run directory only."""

from polyclinic.report.pictures import embedding_table, save_views_figure
from polyclinic.report.render import render_report, render_shared
from polyclinic.report.run import read_run

__all__ = ["embedding_table", "read_run", "render_report", "render_shared", "save_views_figure"]
