"""Experiment -> DataFrame -> CSV, figures, provenance; ours beside the paper's."""

from kdiga_nb.report.figures import (
    PALETTE,
    plot_audit,
    plot_bars,
    plot_bounds,
    plot_effects,
    plot_epsilon,
    plot_loops,
    plot_plane,
    plot_radii,
    plot_surfaces,
    plot_tightness,
)
from kdiga_nb.report.files import ReproductionError, commit, provenance, reproduce, save
from kdiga_nb.report.numbers import (
    COLUMNS,
    INTERVAL,
    NAMES,
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
