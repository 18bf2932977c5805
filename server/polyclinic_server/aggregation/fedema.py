"""FedEMA [Zhuang et al., 2204.04385]: federated averaging of sites that start between the global encoder and their own,

    m w_k + (1 - m) w_g,    m = min(lambda_k |w_g - w_k|, 1),    lambda_k = tau / |w_g - w_k| when k first comes back,

w_k what the site's newest round has made, w_g the global tensors, |.| over all weights of the encoder. So a site starts
its second round with m = tau, and later ones with more of its own the further it is away. Its update is relative to
w_g, and is averaged as ever; the mixture is made at the site (`polyclinic_client.personal`).

The paper's encoder, BYOL's, has a predictor that is mixed alike; here the heads of a stage are the global ones (ours).
"""

from polyclinic_server.aggregation.fedavg import FedAvg


class FedEMA(FedAvg):
    """The running sum of a round, as of FedAvg."""
