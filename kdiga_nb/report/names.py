"""Metrics in readers' words."""

import re

_METRIC_NAMES = {"autoattack": "AutoAttack", "apgd": "APGD-CE + APGD-T"}
# Attacks of the audit.
NAMES = {
    "pgd": "PGD, plain",
    "pgd_more": "PGD, five times the steps",
    "pgd_long": "PGD, long, with restarts",
    "margin": "margin loss",
    "dlr": "DLR loss",
    "targeted": "targeted, all other classes",
    "scaled": "scaled logits",
    "noise": "random noise, best of 10",
    "hard_label": "RayS (labels only)",
    "square": "Square (scores only)",
    "autoattack": "AutoAttack",
    "clean": "clean",
}
# Headings of tables; a figure's labels are shorter.
_HEADINGS = {
    "norm": "‖g‖₂",
    "gradient_norm": "‖g‖₂",
    "cosine": "cosine to the teacher's gradient",
    "gradient_cosine": "cosine to the teacher's gradient",
    "cosine_to_loop_0": "cosine to loop 0's gradient",
    "zero_gradients": "zero gradients (%)",
    "training_seconds": "training (s)",
    "radius_interval": "radius by interval bounds",
    "radius_crown": "radius by CROWN",
    "radius_attack": "radius by attack",
    "radius_one_sided": "radius, one-sided",
    "certified": "certified (%)",
    "kept": "certified radius kept (%)",
    "kept_proven": "certainly kept (%)",
    "lost_proven": "certainly lost (%)",
    "distance_loss": "‖g_s − g_t‖₂, loss",
    "distance_logits": "‖g_s − g_t‖₂, all logits",
    "distance_l1": "‖g_s − g_t‖₁",
    "distance_l2": "‖g_s − g_t‖₂",
    "gradient_distance": "‖g_s − g_t‖₂",
    "gradient_distance_l1": "‖g_s − g_t‖₁",
    "gradient_distance_batch": "‖g_s − g_t‖ over the batch",
    "gap": "measured gap",
    "bound": "bound (dual norm)",
    "bound_tight": "tighter bound",
    "bound_l2": "bound (ℓ2 norm)",
    "tightness": "gap ÷ bound",
    "tightness_tight": "gap ÷ tighter bound",
    "violations": "violations, dual norm",
    "violations_tight": "violations, tighter bound",
    "violations_l2": "violations, ℓ2 norm",
    "llm": "local linearity (LLM)",
    "llm_student": "LLM of the student",
    "llm_teacher": "LLM of the teacher",
    "llm_half_eps": "LLM at ε/2",
    "llm_eps": "LLM at ε",
    "llm_eps_teacher": "LLM of the teacher at ε",
    "cross_entropy": "CE of the student",
    "cross_entropy_teacher": "CE of the teacher",
    "ce_sum": "CE_s + CE_t",
    "ce_difference": "|CE_s − CE_t|",
}


def metric_name(metric: str) -> str:
    """A metric as readers write it: ``pgd20@0.05`` is "PGD-20, ε = 0.05"."""
    name, separator, radius = metric.partition("@")
    name = _METRIC_NAMES.get(name) or re.sub(r"^pgd(\d+)$", r"PGD-\1", name)
    return f"{name}, ε = {radius}" if separator else name


def heading(metric: str) -> str:
    """A metric as the heading of a table's column, without keys of the code."""
    if metric.startswith("teacher_"):
        return f"teacher, {heading(metric.removeprefix('teacher_'))}"
    if metric.startswith("validation_"):
        return f"held out, {heading(metric.removeprefix('validation_'))}"
    return _HEADINGS.get(metric) or NAMES.get(metric) or metric_name(metric).replace("_", " ")
