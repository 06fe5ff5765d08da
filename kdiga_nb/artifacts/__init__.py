"""Every artefact: the tables and the figure of the paper, the explorer, and the studies that the paper lacks."""

from kdiga_nb.artifacts.explore import CHAINS, Point, explore, explored, reference_teacher
from kdiga_nb.artifacts.paper import figure1, table1, table2, table3, table4, table5, table6
from kdiga_nb.artifacts.studies import (
    TAUGHT,
    WEIGHTED,
    Effect,
    Factor,
    ablations,
    alignment_or_penalty,
    audit_jobs,
    audit_plan,
    baselines,
    combination_row,
    factors,
    findings,
    isd_autoattack,
    isd_factors,
    isd_search,
    main_effects,
    pareto,
    prop1_certified,
    prop2_bound,
    robustness_audit,
    taught_row,
    weighted_row,
    weights_of,
    worth_of_test_selection,
)
from kdiga_nb.artifacts.table import Artifact, Cell, Experiment, Nets, PerSeed, Row
from kdiga_nb.params import (
    AblationParams,
    AlignmentParams,
    AuditParams,
    BaselineParams,
    ExploreParams,
    IsdAutoAttackParams,
    IsdSearchParams,
    ParetoParams,
    Prop1Params,
    Prop2Params,
    Table1Params,
    Table2Params,
    Table3Params,
    Table4Params,
    Table5Params,
    Table6Params,
)

ARTIFACTS: dict[str, Artifact] = {
    "figure1": Artifact(Table1Params, figure1),
    "table1": Artifact(Table1Params, table1),
    "table2": Artifact(Table2Params, table2),
    "table3": Artifact(Table3Params, table3),
    "table4": Artifact(Table4Params, table4),
    "table5": Artifact(Table5Params, table5),
    "table6": Artifact(Table6Params, table6),
    "explore": Artifact(ExploreParams, explore),
}
STUDIES: dict[str, Artifact] = {
    "robustness_audit": Artifact(AuditParams, robustness_audit),
    "isd_autoattack": Artifact(IsdAutoAttackParams, isd_autoattack),
    "prop1_certified": Artifact(Prop1Params, prop1_certified),
    "prop2_bound": Artifact(Prop2Params, prop2_bound),
    "ablations": Artifact(AblationParams, ablations),
    "pareto": Artifact(ParetoParams, pareto),
    "alignment_or_penalty": Artifact(AlignmentParams, alignment_or_penalty),
    "isd_search": Artifact(IsdSearchParams, isd_search),
    "baselines": Artifact(BaselineParams, baselines),
}
EVERY: dict[str, Artifact] = ARTIFACTS | STUDIES
