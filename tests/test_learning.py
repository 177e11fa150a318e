"""Training takes the same course: the first losses agree with stock's, the last are within stock's own spread."""

import copy
import this

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdl
from fastdl.ops import calls
from models import CharacterModel, resnet


@pytest.fixture(autouse=True)
def fresh_record():
    calls.handbacks.clear()


def text():
    """The Zen of Python, which the standard library keeps in rot13."""
    return "".join(this.d.get(c, c) for c in this.s)


def learn(model, optimizer, batches):
    """The loss of every step; a batch is (input, classes [...]), the model gives [..., number of classes]."""
    losses = []
    for x, classes in batches:
        loss = F.cross_entropy(model(x).flatten(0, -2), classes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def digit_batches(seed, steps, layout):
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).div(16).unsqueeze(1)
    labels, generator = torch.tensor(data.target), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        yield images[rows].contiguous(memory_format=layout), labels[rows]


def character_batches(seed, steps, length=32, batch=16):
    zen, generator = text(), torch.Generator().manual_seed(seed)
    characters = sorted(set(zen))
    ids = torch.tensor([characters.index(c) for c in zen])
    for _ in range(steps):
        starts = torch.randint(len(ids) - length - 1, (batch, 1), generator=generator)
        pieces = ids[starts + torch.arange(length + 1)]
        yield pieces[:, :-1], pieces[:, 1:]


def courses(model, optimizer, batches, seed, layout=torch.contiguous_format):
    """Losses of stock and of its optimised copy; `layout` is the copy's."""
    torch.manual_seed(seed)
    stock = model()
    ours = fastdl.optimize(copy.deepcopy(stock)).to(memory_format=layout)
    found = [
        learn(m, optimizer(m.parameters()), batches(seed, at))
        for m, at in ((stock, torch.contiguous_format), (ours, layout))
    ]
    assert not calls.handbacks
    return found


def assert_the_same_course(pairs):
    """pairs: (stock's losses, ours) of several seeds."""
    finals = [[sum(losses[-20:]) / 20 for losses in pair] for pair in pairs]
    for expected, found in pairs:
        assert found[:10] == pytest.approx(expected[:10], rel=1e-4)
        assert sum(found[-20:]) / 20 < 0.6 * found[0]
    stock = [expected for expected, _ in finals]
    for expected, found in finals:
        assert abs(found - expected) <= max(max(stock) - min(stock), 0.01 * expected)


def silu_resnet():
    """Without kinks: where a ReLU changes sides by rounding, torch's own layouts differ by 1e-3 in ten steps."""
    return resnet(activation=nn.SiLU)


def sgd(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_first_steps_of_a_residual_network(layout):
    expected, found = courses(silu_resnet, sgd(1e-3), lambda seed, at: digit_batches(seed, 12, at), 0, layout)
    assert found[:10] == pytest.approx(expected[:10], rel=1e-5)
    assert found[-1] < found[0]


@pytest.mark.slow
def test_a_residual_network_learns_digits_as_stock():
    def batches(seed, layout):
        return digit_batches(seed, 200, layout)

    assert_the_same_course([courses(silu_resnet, sgd(2e-3), batches, seed, torch.channels_last) for seed in range(3)])


@pytest.mark.slow
def test_a_character_model_learns_as_stock():
    zen = text()
    assert "Beautiful is better than ugly." in zen

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=5e-3)

    def model():
        return CharacterModel(len(set(zen)))

    def batches(seed, _):
        return character_batches(seed, 200)

    assert type(fastdl.optimize(model()).lstm) is fastdl.nn.LSTM
    assert_the_same_course([courses(model, adam, batches, seed) for seed in range(3)])
