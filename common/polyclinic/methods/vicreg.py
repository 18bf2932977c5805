"""VICReg: two views agree, every dimension varies, no two dimensions say the same.

Bardes, Ponce & LeCun, VICReg: variance-invariance-covariance regularization, ICLR 2022.

    25 mean((z - z')^2) + 25 v(z, z') + c(z) + c(z'),
    v = mean over both and dimensions of relu(1 - sqrt(var + 1e-4)),
    c = sum of squared covariances off the diagonal / D

with variance and covariance over the batch, unbiased. It is one number a batch, not a sum over images.
"""

import torch
from torch import Tensor

INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0
EPSILON = 1e-4


def vicreg(first: Tensor, second: Tensor) -> Tensor:
    """The loss of (n, dim) pairs, a scalar in at least float32, whatever autocast says. n is at least 2."""
    with torch.autocast(first.device.type, enabled=False):
        pair = torch.stack([first, second])  # (2, n, dim)
        z = pair.to(torch.promote_types(pair.dtype, torch.float32))
        invariance = (z[0] - z[1]).square().mean()
        spread = (z.var(dim=1) + EPSILON).sqrt()
        centred = z - z.mean(dim=1, keepdim=True)
        n, dim = z.shape[1:]
        covariance = centred.transpose(1, 2) @ centred / (n - 1)  # (2, dim, dim)
        squares = covariance.square().sum() - covariance.diagonal(dim1=1, dim2=2).square().sum()
        loss: Tensor = INVARIANCE * invariance + VARIANCE * torch.relu(1 - spread).mean() + COVARIANCE * squares / dim
        return loss
