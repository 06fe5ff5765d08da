"""Check, by hand or in batch, what knowledge distillation with input gradient alignment (KDIGA) really gives.

The package implements the paper "How and When Adversarial Robustness Improves in Knowledge Distillation?"
(Shao, Yi, Hsieh, Chen): its losses, its training methods, iterative self-distillation and the attacks that judge
them. The notebooks narrate and call; everything that computes is here, one job a module (see README.md).
"""

__version__ = "1.0.0"
