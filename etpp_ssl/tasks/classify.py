"""The loss of a classifier.

Legend: B batch, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_target_cross_entropy(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Cross-entropy against probabilities, the mean over the batch, a float32 scalar.

    The log-softmax is taken in float32, also inside autocast.

    Args:
        logits_BK: floating point (B, K), B at least 1.
        targets_BK: probabilities, floating point (B, K).
    """
    log_probabilities = torch.log_softmax(logits_BK.float(), dim=1)
    return -(targets_BK.float() * log_probabilities).sum(1).mean()
