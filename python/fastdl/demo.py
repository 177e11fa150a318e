"""`fastdl demo`: a small network learns handwritten digits twice, by stock PyTorch and by fastdl, from one seed.

Both runs are interleaved epoch by epoch, so that neither has the colder machine, and see the same batches.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdl

_HIDDEN = 512
_BATCH = 256
_FIRST_LOSSES = 10
_FIRST_TOLERANCE = 1e-4  # relative, of the first losses
_FINAL_TOLERANCE = 1e-2  # relative, of the last epoch's mean loss


@dataclass
class Run:
    """One network's course: the loss of every step, seconds of every epoch, accuracy on the held-out digits."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images [n, 64], train labels [n], test images, test labels); every fifth digit is held out."""
    try:
        from sklearn.datasets import load_digits as bundled
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("fastdl demo needs scikit-learn: pip install 'fastdl[demo]'") from error
    data = bundled()
    images = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    held_out = torch.arange(len(labels)) % 5 == 4
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def make_model(seed: int) -> nn.Module:
    """64-512-512-10, the same parameters for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 10)
    )


def _train_epoch(model: nn.Module, optimizer: Any, images: Tensor, labels: Tensor, order: Tensor, run: Run) -> None:
    start = time.perf_counter()
    losses = []
    for batch in order.split(_BATCH):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    run.seconds.append(time.perf_counter() - start)
    run.losses += torch.stack(losses).tolist()


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-30)


def train(epochs: int = 40, seed: int = 0) -> dict[str, Any]:
    """Train both; {"seed", "epochs", "steps", "stock", "optimised", "first_difference", "final_difference", "alike"}.

    "alike": the first 10 losses agree within 1e-4 and the last epochs' mean losses within 1%, both relative.
    Raises ModuleNotFoundError without scikit-learn.
    """
    images, labels, test_images, test_labels = load_digits()
    models = {"stock": make_model(seed), "optimised": fastdl.optimize(make_model(seed), strict=True)}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for name, model in models.items()}
    runs = {name: Run() for name in models}
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=shuffle)
        for name in models if epoch % 2 == 0 else reversed(models):
            _train_epoch(models[name], optimizers[name], images, labels, order, runs[name])
    with torch.no_grad():
        for name, model in models.items():
            runs[name].accuracy = (model(test_images).argmax(1) == test_labels).double().mean().item()
    stock, optimised = runs["stock"].losses, runs["optimised"].losses
    per_epoch = len(stock) // epochs
    finals = [sum(losses[-per_epoch:]) / per_epoch for losses in (stock, optimised)]
    first = max(_relative(a, b) for a, b in zip(stock[:_FIRST_LOSSES], optimised[:_FIRST_LOSSES], strict=True))
    final = _relative(*finals)
    return {
        "seed": seed,
        "epochs": epochs,
        "steps": len(stock),
        "batch": _BATCH,
        "threads": torch.get_num_threads(),
        **{name: asdict(run) for name, run in runs.items()},
        "first_difference": first,
        "final_difference": final,
        "alike": first <= _FIRST_TOLERANCE and final <= _FINAL_TOLERANCE,
    }
