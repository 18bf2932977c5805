"""FedProx [Li et al., 1812.06127]: federated averaging of sites that train with a term more in their loss,

    mu/2 |w - w_g|^2,    w_g the global tensors that the round began with.

The term acts at the site (`polyclinic.training.proximal`); what comes back is averaged as ever. [Li et al.] also lets
slow sites do less work in a round; here all do what the stage says.
"""

from polyclinic_server.aggregation.fedavg import FedAvg


class FedProx(FedAvg):
    """The running sum of a round, as of FedAvg."""
