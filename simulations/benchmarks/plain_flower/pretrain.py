"""The plain Flower simulation of `scale.py`: FedAvg over sites that train in torch, their images held in memory.

Model, views and loss are the study's, so that both sides compute the same; all around them is what Flower's own
examples do: the model is built for each message and takes the tensors that came, the optimizer starts afresh.
"""

import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from PIL import Image
from scale import PATIENTS, TRAINED, make_study

from polyclinic.methods.base import Batch
from polyclinic.model import build_stage
from polyclinic.training import BETAS, CLIP

client = ClientApp()


@cache
def load_images(data: Path, site: int) -> torch.Tensor:
    """(images, 1, size, size) in [0, 1] that a site trains on."""
    paths = [data / f"{site * PATIENTS + number:05d}.png" for number in range(TRAINED)]
    return torch.from_numpy(np.stack([np.asarray(Image.open(path), np.float32) for path in paths]) / 255)[:, None]


@client.train()
def train(message: Message, context: Context) -> Message:
    """One epoch of the tensors that came on the site's images: one batch."""
    started = time.monotonic()
    config = message.content.config_records["config"]
    study = make_study(1, 1)
    method, module = build_stage(study, 0)
    module.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    stage = study.stages[0]
    optimizer = torch.optim.AdamW(module.parameters(), stage.learning_rate, BETAS, weight_decay=stage.weight_decay)
    images = load_images(Path(str(config["data"])), int(context.node_config["partition-id"]))
    views = method.views(Batch(images, torch.arange(len(images))), torch.Generator())
    torch.autograd.backward(method.loss(module, views).mean())
    torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
    optimizer.step()
    metrics = MetricRecord({"num-examples": len(images), "seconds": time.monotonic() - started})
    content = RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


def run(sites: int, rounds: int, data: Path) -> tuple[list[float], list[float]]:
    """The monotonic clock as the first round starts and as each ends, and the sites' seconds of training by round."""
    marks: list[float] = []
    trained: list[float] = []
    server = ServerApp()

    def note(number: int, arrays: ArrayRecord) -> None:
        marks.append(time.monotonic())

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        _, module = build_stage(make_study(1, 1), 0)
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
        config = ConfigRecord({"data": str(data)})
        weights = ArrayRecord(module.state_dict())
        found = strategy.start(grid, weights, num_rounds=rounds, train_config=config, evaluate_fn=note)
        trained.extend(float(metrics["seconds"]) * sites for metrics in found.train_metrics_clientapp.values())

    run_simulation(server, client, sites, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    return marks, trained
