"""The rules by which updates become new global tensors: one file a rule, one line in RULES."""

from polyclinic_server.aggregation.fedavg import FedAvg

RULES = {"fedavg": FedAvg}
