"""Is the robustness real? The measures of an audit, a verdict by named rules, and certified radii."""

from kdiga_nb.audit.measures import (
    COMPARES,
    Gradients,
    Preconditions,
    Transfer,
    plan,
    preconditions,
)
from kdiga_nb.audit.verdict import (
    MASKING,
    SLACK,
    TELLING,
    WEAKNESS,
    WHITE_BOX,
    Found,
    Rule,
    Verdict,
    autoattack_flags,
    black_box_wins,
    never_to_chance,
    overstated,
    random_output,
    rises_with_radius,
    saturated_loss,
    sweep,
    transfer_wins,
    unconverged,
    uninformative_gradient,
    verdict,
    wrong_step_size,
    zero_gradients,
)
