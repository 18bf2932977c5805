"""The normalised temperature-scaled cross-entropy that contrastive methods share.

Chen et al., A simple framework for contrastive learning of visual representations (SimCLR), ICML 2020, equation 1:

    l(i) = -log( exp(s_ip) / sum over k in {p} and N(i) of exp(s_ik) ),    s_ij = z_i . z_j / (T |z_i| |z_j|)

with p the other view of view i. In SimCLR N(i) is every view but i and p; here it is every view of *another patient*,
since two images of one patient are no evidence of difference (ours). For distinct patients the two are equal.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(first: Tensor, second: Tensor, patients: Tensor, temperature: float) -> Tensor:
    """One loss a pair of views: the mean of l over its two views. SimCLR's loss is the mean over pairs.

    Args:
        first: (n, dim) projections, not yet normalised; row i and row i of `second` are a positive pair.
        second: (n, dim).
        patients: (n,) integers; equal numbers are the same patient. At least two patients.
        temperature: T.

    Returns:
        (n,) in at least float32, whatever autocast says: at T = 0.1 bf16 would lose the differences.
    """
    n = len(first)
    with torch.autocast(first.device.type, enabled=False):
        z = torch.cat([first, second])  # (2n, dim)
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        similarity = z @ z.T / temperature  # (2n, 2n)
        positive = torch.cat([similarity.diagonal(n), similarity.diagonal(-n)])  # (2n,): entry i is s_ip
        same = (patients.unsqueeze(1) == patients.unsqueeze(0)).to(z.device, non_blocking=True)
        negatives = similarity.masked_fill(same.repeat(2, 2), -torch.inf)
        losses = torch.logsumexp(torch.cat([positive.unsqueeze(1), negatives], dim=1), dim=1) - positive
        return losses.view(2, n).mean(dim=0)
