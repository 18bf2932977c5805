"""The plain Flower app of `deployment.py`: FedAvg over sites whose work is to add a hundredth to every value."""

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """The tensors that came, a little larger: at every node by another factor, as Flower sends what is equal once."""
    factor = np.float32(1.01 + context.node_id % 1000 * 1e-5)
    arrays = message.content.array_records["arrays"].items()
    record = ArrayRecord({name: Array(array.numpy() * factor) for name, array in arrays})
    return Message(RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Rounds from the tensors in the file `model`; the file `marks` gets the second since 1970 at which each ended."""
    config = context.run_config
    sites, marks = int(config["sites"]), Path(str(config["marks"]))
    with np.load(str(config["model"])) as model:
        arrays = ArrayRecord({name: Array(model[name]) for name in model.files})

    def note(number: int, arrays: ArrayRecord) -> None:
        if number:
            with marks.open("a") as file:
                file.write(f"{time.time()}\n")

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    strategy.start(grid, arrays, num_rounds=int(config["rounds"]), evaluate_fn=note)
