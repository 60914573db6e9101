"""Symmetric InfoNCE (CLIP, arXiv:2103.00020, figure 3; ConVIRT, arXiv:2010.00747, equations 2-4).

Legend: B batch, E embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Mean of image-to-text and text-to-image cross-entropy; the pairs are the targets.

    image, text: (B, E), unit length; scale: () is exp(log-temperature). Returns () in nats; ln(B)
    for features without information. Logits are float32 whatever autocast says: at a scale of 100
    bf16 would round them to steps of a half.
    """
    with torch.autocast(image.device.type, enabled=False):
        logits = scale.float() * image.float() @ text.float().T  # (B, B), rows are images
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
