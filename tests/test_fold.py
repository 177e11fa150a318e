"""Batch norms that may not be folded, or not any more: what a model computes stays what it was."""

import copy

import pytest
import torch
from torch import nn

import fastdl


class Block(nn.Module):
    def __init__(self, shortcut=None):
        super().__init__()
        self.conv, self.norm, self.shortcut = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), shortcut
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.2, 4)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y if self.shortcut is None else y + self.shortcut(x)


class Residual(Block):
    """Decides by its own attributes alone."""


class Remembers(Block):
    position = None

    def forward(self, x):
        if self.position is None:
            self.position = torch.arange(5.0).to(x.device)
        return self.norm(self.conv(x)) + self.position


class OtherwiseInTraining(Block):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) if self.training else self.norm(y) + y


class Epilogue(Block):
    def __init__(self):
        super().__init__()
        self.conv = fastdl.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.norm(self.conv(x, activation="relu"))


class Optional(Block):
    def forward(self, x, skip=None):
        y = self.conv(x)
        return self.norm(y) + (y if skip is None else skip)


class Typed(Block):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y if isinstance(x, torch.Tensor) else self.norm(y)


class Moded(Block):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y if torch.is_grad_enabled() else self.norm(y)


class Features(Block):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        y = self.features(x)
        return y + 1 if y.sum() > 0 else y


class Slices(Features):
    def forward(self, x):
        return self.features[:1](x)


class Collects(Features):
    def forward(self, x):
        results = []
        for layer in self.features:
            x = layer(x)
            results.append(x.sum())
        return torch.stack(results) if results[0] > 0 else torch.stack(results[::-1])


@pytest.mark.parametrize(
    "model, pairs",
    [
        (Block(), 1),
        (nn.Sequential(Residual(), Residual(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))), 3),
        (Remembers(), 1),
        (OtherwiseInTraining(), 0),
        (Epilogue(), 0),
        (Optional(), 0),
        (Typed(), 0),
        (Moded(), 0),
        (Features(), 1),
        (Slices(), 0),
        (Collects(), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_a_model_computes_stays(model, pairs):
    """Optimized in training mode, as models are made."""
    x, stock = torch.randn(1, 3, 5, 5), copy.deepcopy(model).eval()
    model = fastdl.optimize(copy.deepcopy(model), fold_batchnorm=True).eval()
    assert sum("_fold" in module.__dict__ for module in model.modules()) == 2 * pairs
    torch.testing.assert_close(model(x), stock(x))
    copy.deepcopy(model)


def test_nothing_is_left_in_the_model():
    class Leaves(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.seen = self.conv(x)
            self.steps += 1
            return self.norm(self.seen) * torch.rand(())

    model, state = Leaves(), torch.get_rng_state()
    fastdl.optimize(model, fold_batchnorm=True)
    assert model.steps == 0 and not hasattr(model, "seen")
    assert torch.equal(state, torch.get_rng_state())


def folded_pair():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].running_mean.normal_()
    model[1].running_var.fill_(4.0)
    return fastdl.optimize(model, fold_batchnorm=True)


@pytest.mark.parametrize(
    "parametrize", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_a_convolution_with_computed_parameters_is_on_its_own(parametrize):
    model, x = folded_pair(), torch.randn(1, 3, 5, 5)
    parametrize(model[0])
    model.eval()
    stock = nn.functional.batch_norm(model[0](x), *(getattr(model[1], n) for n in ("running_mean", "running_var")))
    torch.testing.assert_close(model(x), stock)


def test_a_replaced_convolution_leaves_the_norm_its_work():
    model, x = folded_pair(), torch.randn(1, 1, 5, 5)
    model[0] = nn.Conv2d(1, 4, 3).eval()
    torch.testing.assert_close(
        model(x), nn.functional.batch_norm(model[0](x), model[1].running_mean, model[1].running_var)
    )


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_gradients_see_what_is_between(hook):
    model, x, seen = folded_pair(), torch.randn(1, 3, 5, 5, requires_grad=True), []
    getattr(model[0], hook)(lambda module, *grads: seen.append(grads[-1][0].mean()))
    model(x).sum().backward()
    torch.testing.assert_close(seen[0], torch.tensor((4.0 + model[1].eps) ** -0.5))


def test_global_hooks_see_what_is_between():
    model, x, seen = folded_pair(), torch.randn(1, 3, 5, 5), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(out))
    try:
        model(x)
    finally:
        handle.remove()
    torch.testing.assert_close(seen[0], nn.functional.conv2d(x, model[0].weight, model[0].bias))
