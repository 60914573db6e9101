"""Knowledge of a frozen teacher CLIP: its vectors, or its similarities within a batch.

Feature and relation distillation as in CLIP-KD (arXiv:2307.12732, FD and CRD); the latter is the
affinity mimicking of TinyCLIP (arXiv:2309.12314). No gradient reaches the teacher. Both
compute in float32 at least, whatever autocast says, and return this rank's share: the shares of all
ranks add up to the loss.

Legend: B own rows, N global batch, E embedding (of student and teacher).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.objectives.exact import in_float32


def feature_distillation_loss(student: Tensor, teacher: Tensor, total: int) -> Tensor:
    """Squared distance of the student's directions from the teacher's: |s - t|^2 = 2 - 2 cos(s, t).

    student, teacher: (B, E) of any length; where the two embeddings differ in size, map the
    student's with a linear layer first. Returns () the sum over own rows / `total`, the rows of all
    ranks. From 0 to 4.
    """
    with in_float32(student.device):
        difference = _unit(student) - _unit(teacher.detach())
        return difference.square().sum() / total


def affinity_distillation_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    *,
    own: slice | None = None,
) -> Tensor:
    """Cross-entropy of the student's similarities with the teacher's as soft targets, both ways.

    -sum over j of softmax_j(teacher's logits_ij) * log softmax_j(student's logits_ij), the mean
    over rows i, pictures and captions alike (open_clip's DistillClipLoss). Its least value is the
    entropy of the teacher's answers, not 0. Images and texts: (N, E), unit length, the student's
    and the teacher's each of their own E; scales: () are exp(log-temperature). Returns () in nats.
    """
    with in_float32(student_image.device):
        rows = slice(None) if own is None else own
        student = _exact(student_image), _exact(student_text)
        teacher = _exact(teacher_image.detach()), _exact(teacher_text.detach())
        loss = student[0].new_zeros(())
        for queries, keys in ((0, 1), (1, 0)):
            logits = _exact(student_scale) * student[queries][rows] @ student[keys].T  # (B, N)
            answers = _exact(teacher_scale.detach()) * teacher[queries][rows] @ teacher[keys].T
            loss = loss + F.cross_entropy(logits, answers.softmax(dim=1), reduction="sum")
        return loss / (2 * len(student_image))


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(_exact(rows), dim=1)


def _exact(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
