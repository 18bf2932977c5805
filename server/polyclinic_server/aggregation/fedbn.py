"""FedBN [Li et al., 2102.07623]: every site k keeps the encoder's normalisation layers, N_k, as its own,

    w_N <- N_k before it measures and trains,    N_k <- w_N afterwards,    w <- w + sum_k (n_k / n) delta_k

whatever they normalise (batches, with their running statistics, groups or layers). The first two happen at the site
(`polyclinic_client.personal`), and the figures that sites measure are those of the encoder with their own layers.

In the paper these layers are not sent, and there is no model for anybody else. Here their delta, from the global ones
to N_k, is sent and averaged with all others: the encoder that is exported needs one set, and has the sites' mean.
"""

from polyclinic_server.aggregation.fedavg import FedAvg


class FedBN(FedAvg):
    """The running sum of a round, as of FedAvg."""
