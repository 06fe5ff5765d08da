"""ℓ∞ attacks: FGSM, PGD and its variants, RayS, AutoAttack."""

from kdiga_nb.attacks.autoattack import LOGITS_COMPARED, MEMBERS, AutoAttack, AutoAttackReport
from kdiga_nb.attacks.checks import check_inputs
from kdiga_nb.attacks.gradient import FGSM, PGD, Objective, SignAscent, ball, evaluation_pgd
from kdiga_nb.attacks.losses import LOSSES, LossPGD, dlr, margin
from kdiga_nb.attacks.rays import RayS

Attack = PGD | FGSM | AutoAttack
ATTACKS: dict[str, type[PGD] | type[FGSM] | type[AutoAttack]] = {"pgd": PGD, "fgsm": FGSM, "autoattack": AutoAttack}
