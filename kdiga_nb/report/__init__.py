"""Experiment -> DataFrame -> CSV, figures and provenance, with the paper's numbers for comparison."""

from kdiga_nb.report.figures import PALETTE, plot_bounds, plot_dots, plot_epsilon, plot_loops, plot_plane
from kdiga_nb.report.files import ReproductionError, commit, provenance, reproduce, save
from kdiga_nb.report.names import NAMES, heading, metric_name
from kdiga_nb.report.numbers import (
    COLUMNS,
    INTERVAL,
    audit_table,
    best,
    claim,
    effects_table,
    flags,
    frame,
    interval,
    results,
    short,
    show,
    value,
    values,
    verdict_table,
    with_training_cost,
)
from kdiga_nb.report.pairs import STARS, Difference, compare, differences, holm, row_of
from kdiga_nb.report.study_figures import (
    plot_audit,
    plot_effects,
    plot_radii,
    plot_search,
    plot_surfaces,
    plot_teachers,
    plot_tightness,
    plot_weights,
)
from kdiga_nb.report.tables import Grid, audit_grid
from kdiga_nb.report.verdicts import headline, print_verdicts, verdicts, with_audit
