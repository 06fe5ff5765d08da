"""The terms of the paper's equations as pure tensor functions.

Shapes: B examples, N classes, images (B, C, H, W) with pixels in [0, 1]. Losses are in nats, one value per example;
the caller reduces them in one visible place. A divergence is exactly zero where its arguments are equal, and its
gradient is finite there. Iterative self-distillation starts at that point, apart from batch normalisation, which makes
a student in train mode and its teacher in eval mode different functions of the same weights.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdiga_nb.numerics import distributed
from kdiga_nb.numerics.double_backward import twice_differentiable

NORMS = ("per_sample", "batch")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example in nats, (B, N), (B,) -> (B,). Appendix A, Equation 8."""
    return F.cross_entropy(logits, labels, reduction="none")


def distillation_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(teacher ‖ student) of the softmaxes at temperature T, (B, N), (B, N) -> (B,) in nats. Section 2.1.

    Zero if and only if the two softmaxes agree. With the factor T² the size of the gradient does not depend on T.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)


def input_gradient(
    model: nn.Module | Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradient of the SUMMED cross-entropy with respect to the pixels, and the logits, from one forward pass.

    With the sum, each row is the gradient of that example's own loss at any batch size; a mean would divide the row by
    B. In train mode batch normalisation mixes the examples, so a row is the gradient of the loss of the whole batch.

    Args:
        model: images (B, C, H, W) -> logits (B, N).
        x: images (B, C, H, W) in [0, 1].
        y: labels (B,).
        create_graph: keep the graph, so that a loss of the gradient can be differentiated with respect to the model's
            parameters (double backpropagation). Otherwise both results are detached.

    Returns:
        (B, C, H, W) gradient in nats per unit of pixel value, (B, N) logits.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        with twice_differentiable() if create_graph else nullcontext():
            logits = model(x)
        (gradient,) = torch.autograd.grad(cross_entropy(logits, y).sum(), x, create_graph=create_graph)
    return (gradient, logits) if create_graph else (gradient, logits.detach())


def gradient_distance(g_student: Tensor, g_teacher: Tensor, norm: str = "per_sample") -> Tensor:
    """The alignment term ‖g_s − g_t‖₂ of Section 2.1 for a batch, (B, C, H, W), (B, C, H, W) -> scalar.

    With d_i the difference of example i:

    * ``per_sample``, the paper's reading: the mean over the batch of ‖d_i‖₂;
    * ``batch``, the authors' code: (1/B)·‖(1/B)[d_1 … d_B]‖_F. Their gradients are those of the batch-MEAN loss (the
      inner 1/B), one Frobenius norm is taken over the whole batch, and their coefficient is divided by the batch size
      (the outer 1/B). It equals B^-1.5 times the root mean square of ‖d_i‖₂.

    ``torch.linalg.vector_norm`` has gradient 0 at 0, where ``sqrt(sum of squares)`` has NaN. With several processes the
    batch is the batch of all processes.

    Raises:
        ValueError: an unknown norm.
    """
    difference = (g_student - g_teacher).flatten(1)
    if norm == "per_sample":
        return torch.linalg.vector_norm(difference, dim=1).mean()
    if norm == "batch" and distributed.world_size() == 1:
        return torch.linalg.vector_norm(difference) / len(difference) ** 2
    if norm == "batch":
        # The norm over the batch of all processes is the norm of the vector of their norms.
        norms = difference.new_zeros(distributed.world_size())
        norms[distributed.rank()] = torch.linalg.vector_norm(difference)
        examples = distributed.summed(difference.new_tensor(len(difference)))
        return torch.linalg.vector_norm(distributed.summed(norms)) / examples**2
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")


def logit_gradients(
    model: nn.Module | Callable[[Tensor], Tensor], x: Tensor, *, create_graph: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of all logits with respect to the pixels, minus their mean over the classes, and the logits.

    Softmax ignores a common logit shift, so the mean gradient over classes is subtracted (N − 1 degrees of freedom).
    Equal gradients of all logits fix the decision in the linear region; an equal gradient of the loss (Proposition 1)
    does so only for N = 2. The cost is one forward pass and N backward passes.

    Args:
        model, x, create_graph: as in ``input_gradient``.

    Returns:
        (B, N, C, H, W) gradients in logits per unit of pixel value, (B, N) logits.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        with twice_differentiable() if create_graph else nullcontext():
            logits = model(x)
        rows = [
            torch.autograd.grad(logits[:, label].sum(), x, create_graph=create_graph, retain_graph=True)[0]
            for label in range(logits.shape[1])
        ]
        gradients = torch.stack(rows, dim=1)
        gradients = gradients - gradients.mean(dim=1, keepdim=True)
    return (gradients, logits) if create_graph else (gradients, logits.detach())
