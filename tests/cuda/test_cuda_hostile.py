"""Calls that torch refuses, and some that it should: with CUDA tensors the same exception as with those of the CPU, for
the same reason. On the host twin, and on a GPU."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastdl
from fastdl import functional as f
from fastdl.ops import cuda

HUGE = 2**31


class Maker:
    """Makes the operands of a case on a device."""

    def __init__(self, device):
        self.device = torch.device(device)

    def __call__(self, *shape, dtype=torch.float32):
        values = torch.cos(torch.arange(math.prod(shape), dtype=torch.float64)).view(shape)
        return values.to(dtype).to(self.device)

    def meta(self, *shape):
        return torch.empty(shape, device="meta")

    def layer(self, cls, *args, **options):
        torch.manual_seed(3)
        return getattr(fastdl.nn, cls)(*args, **options).to(self.device)


def in_place(make):
    x, w = make(3, 4).requires_grad_(), make(5, 4).requires_grad_()
    y = f.linear(x * 1, w, activation="gelu")
    with torch.no_grad():
        w.add_(1)
    y.sum().backward()


def packed(make, lengths, *, sorted_=True, T=5, B=3):
    x = make(T, B, 6)
    return pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=sorted_)


def wrong_pack(make, sizes, rows):
    return make.layer("LSTM", 6, 8)(PackedSequence(make(rows, 6), torch.tensor(sizes)))


def with_weight(make, shape):
    layer = make.layer("LSTM", 6, 8)
    layer.weight_hh_l0 = torch.nn.Parameter(make(*shape))
    return layer(make(2, 3, 6))


def with_copies(make):
    layer = make.layer("Linear", 4, 5)
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    return again(make(3, 4)) - layer(make(3, 4))


def inference(make):
    with torch.inference_mode():
        return f.linear(make(3, 4), make(5, 4), activation="relu") + f.conv2d(make(1, 1, 3, 5), make(1, 1, 1, 1))[0, 0]


def double_backward(make):
    x, w = make(3, 4).requires_grad_(), make(5, 4).requires_grad_()
    (dx,) = torch.autograd.grad(f.linear(x, w).square().sum(), x, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), w)[0]


def autocast(make):
    with torch.autocast(make.device.type, torch.bfloat16):
        return f.linear(make(3, 4), make(5, 4))


def sdpa(make, q=(1, 2, 3, 8), k=(1, 2, 5, 8), v=(1, 2, 5, 8), mask=None, **options):
    return f.scaled_dot_product_attention(make(*q), make(*k), make(*v), mask, **options)


def conv(make, x=(1, 4, 5, 5), w=(6, 4, 3, 3), b=None, **options):
    return f.conv2d(make(*x), make(*w), None if b is None else make(*b), **options)


def transposed(make, **options):
    return f.conv_transpose2d(make(1, 4, 5, 5), make(4, 6, 3, 3), **options)


def lstm(make, x=(2, 3, 6), states=None, **options):
    layer = make.layer("LSTM", 6, 8, **options)
    return layer(make(*x), None if states is None else tuple(make(*s) for s in states))


CASES = {
    # all operations
    "dtype mix": lambda t: f.linear(t(3, 4), t(5, 4, dtype=torch.bfloat16)),
    "dtype mix in matmul": lambda t: f.matmul(t(3, 4), t(4, 5).half()),
    "dtype mix in attention": lambda t: f.scaled_dot_product_attention(t(1, 1, 2, 8), *[t(1, 1, 2, 8).half()] * 2),
    "dtype mix in conv": lambda t: f.conv2d(t(1, 1, 3, 3), t(1, 1, 1, 1).double()),
    "dtype mix in lstm": lambda t: t.layer("LSTM", 6, 8)(t(2, 3, 6).half()),
    "list": lambda t: f.linear([[1.0]], t(1, 1)),
    "None": lambda t: f.matmul(t(1, 1), None),
    "number for a query": lambda t: f.scaled_dot_product_attention(1.0, t(1, 1, 2, 8), t(1, 1, 2, 8)),
    "list for an image": lambda t: f.conv2d([1.0], t(1, 1, 1, 1)),
    "list for a sequence": lambda t: t.layer("GRU", 6, 8)([1.0]),
    "meta weight": lambda t: f.linear(t(3, 4), t.meta(5, 4)),
    "meta key": lambda t: f.scaled_dot_product_attention(t(1, 1, 2, 8), t.meta(1, 1, 2, 8), t(1, 1, 2, 8)),
    "meta kernel": lambda t: f.conv2d(t(1, 1, 3, 3), t.meta(1, 1, 1, 1)),
    "meta input of a layer": lambda t: t.layer("LSTM", 6, 8)(t.meta(2, 3, 6)),
    "zero sizes": lambda t: (f.linear(t(0, 4), t(5, 4)), f.linear(t(3, 4), t(0, 4)), f.matmul(t(2, 0, 3), t(3, 4))),
    "expanded": lambda t: f.linear(t(1, 4).expand(3, 4), t(5, 1).expand(5, 4)),
    "transposed": lambda t: f.linear(t(4, 3).mT, t(4, 5).mT),
    "sliced": lambda t: f.linear(t(6, 8)[::2, ::2], t(5, 9)[:, 1:9:2]),
    "unaligned": lambda t: f.linear(t(13)[1:].view(3, 4), t(21, dtype=torch.float32)[1:].view(5, 4)),
    "subnormal": lambda t: f.linear(t(3, 4) * 1e-40, t(5, 4)),
    "NaN and Inf": lambda t: f.linear(torch.full_like(t(3, 4), math.inf), torch.full_like(t(5, 4), math.nan)),
    "in-place change": in_place,
    "double backward": double_backward,
    "inference mode": inference,
    "autocast": autocast,
    "copies": with_copies,
    # GEMM
    "K": lambda t: f.linear(t(3, 4), t(5, 3)),
    "K in matmul": lambda t: f.matmul(t(3, 4), t(3, 4)),
    "bias length": lambda t: f.linear(t(3, 4), t(5, 4), t(4)),
    "bias 2-D": lambda t: f.linear(t(3, 4), t(5, 4), t(1, 5)),
    "0-D input": lambda t: f.linear(t(), t(5, 4)),
    "0-D operand": lambda t: f.matmul(t(3, 4), t()),
    "weight 3-D": lambda t: f.linear(t(3, 4), t(2, 5, 4)),
    "batches that do not broadcast": lambda t: f.matmul(t(2, 3, 4), t(3, 4, 5)),
    "K is 0": lambda t: f.linear(t(3, 0), t(5, 0), t(5)),
    "0 times NaN": lambda t: f.linear(torch.zeros_like(t(3, 4)), torch.full_like(t(5, 4), math.nan)),
    "sizes that overflow": lambda t: f.matmul(t(1, 1).expand(HUGE * 4, 1), t(1, 1).expand(1, HUGE * 4)),
    "activation": lambda t: f.linear(t(3, 4), t(5, 4), activation="swish"),
    "residual's shape": lambda t: f.linear(t(3, 4), t(5, 4), residual=t(3, 4)),
    # convolution
    "channels": lambda t: conv(t, w=(6, 3, 3, 3)),
    "kernel beyond the input": lambda t: conv(t, w=(6, 4, 7, 7)),
    "stride 0": lambda t: conv(t, stride=0),
    "stride -1": lambda t: conv(t, stride=-1),
    "padding -1": lambda t: conv(t, padding=-1),
    "dilation 0": lambda t: conv(t, dilation=0),
    "groups 0": lambda t: conv(t, groups=0),
    "groups -1": lambda t: conv(t, groups=-1),
    "groups that do not divide": lambda t: conv(t, groups=3),
    "conv bias 2-D": lambda t: conv(t, b=(6, 1)),
    "conv bias length": lambda t: conv(t, b=(5,)),
    "rank 2": lambda t: conv(t, x=(5, 5)),
    "rank 5": lambda t: conv(t, x=(1, 1, 4, 5, 5)),
    "kernel of height 0": lambda t: conv(t, w=(6, 4, 0, 3)),
    "no output channels": lambda t: conv(t, w=(0, 4, 3, 3)),
    "no images": lambda t: conv(t, x=(0, 4, 5, 5)),
    "no channels": lambda t: conv(t, x=(1, 0, 5, 5), w=(6, 0, 3, 3)),
    "same with stride": lambda t: conv(t, padding="same", stride=2),
    "padding string": lambda t: conv(t, padding="full"),
    "stride of 3": lambda t: conv(t, stride=(1, 1, 1)),
    "output padding": lambda t: transposed(t, output_padding=1),
    "dilation 2^62": lambda t: conv(t, dilation=2**62),
    "padding 2^31": lambda t: conv(t, padding=2**31),
    # attention
    "E": lambda t: sdpa(t, k=(1, 2, 5, 9)),
    "heads": lambda t: sdpa(t, k=(1, 3, 5, 8), v=(1, 3, 5, 8)),
    "GQA ratio": lambda t: sdpa(t, q=(1, 5, 3, 8), enable_gqa=True),
    "Lk and Lv": lambda t: sdpa(t, v=(1, 2, 4, 8)),
    "int mask": lambda t: sdpa(t, mask=t(3, 5, dtype=torch.int32)),
    "mask shape": lambda t: sdpa(t, mask=t(4, 5)),
    "masked row": lambda t: sdpa(t, mask=(t(3, 5) > 2)),
    "no keys": lambda t: sdpa(t, k=(1, 2, 0, 8), v=(1, 2, 0, 8)),
    "no queries": lambda t: sdpa(t, q=(1, 2, 0, 8)),
    "no batch": lambda t: sdpa(t, q=(0, 2, 3, 8), k=(0, 2, 5, 8), v=(0, 2, 5, 8)),
    "dropout 1.5": lambda t: sdpa(t, dropout_p=1.5),
    "dropout -1": lambda t: sdpa(t, dropout_p=-1.0),
    "dropout 1": lambda t: sdpa(t, dropout_p=1.0),
    "great logits": lambda t: sdpa(t, scale=1e20),
    "causal, more queries": lambda t: sdpa(t, q=(1, 2, 7, 8), is_causal=True),
    "mask and causal": lambda t: sdpa(t, mask=t(3, 5), is_causal=True),
    "query 1-D": lambda t: sdpa(t, q=(8,)),
    "varlen offsets": lambda t: f.attention_varlen(
        t(5, 2, 8), t(5, 2, 8), t(5, 2, 8), torch.tensor([0, 9]), torch.tensor([0, 5])
    ),
    "varlen lengths": lambda t: f.attention_varlen(
        t(5, 2, 8), t(5, 2, 8), t(5, 2, 8), torch.tensor([0, 5]), torch.tensor([0, 2, 5])
    ),
    # recurrent layers
    "input size": lambda t: lstm(t, x=(2, 3, 5)),
    "1-D": lambda t: lstm(t, x=(6,)),
    "4-D": lambda t: lstm(t, x=(1, 2, 3, 6)),
    "hx": lambda t: lstm(t, states=((1, 2, 8), (1, 3, 8))),
    "cx": lambda t: lstm(t, states=((1, 3, 8), (1, 3, 7))),
    "bare hx": lambda t: t.layer("LSTM", 6, 8)(t(2, 3, 6), t(1, 3, 8)),
    "hx of another dtype": lambda t: t.layer("GRU", 6, 8)(t(2, 3, 6), t(1, 3, 8).half()),
    "no steps": lambda t: lstm(t, x=(0, 3, 6)),
    "no sequences": lambda t: lstm(t, x=(2, 0, 6)),
    "projection": lambda t: t.layer("LSTM", 6, 8, proj_size=8),
    "weight's shape": lambda t: with_weight(t, (32, 7)),
    "packed length 0": lambda t: packed(t, [5, 0, 0]),
    "packed, unsorted": lambda t: packed(t, [1, 5, 2]),
    "packed, longer than T": lambda t: packed(t, [9, 2, 1]),
    "packed sizes that rise": lambda t: wrong_pack(t, [1, 2], 3),
    "packed sizes beyond the rows": lambda t: wrong_pack(t, [3, 2], 4),
    "packed sizes of 0": lambda t: wrong_pack(t, [3, 0], 3),
    "saturated": lambda t: t.layer("LSTM", 6, 8)(t(4, 3, 6) * 1e4),
}  # fmt: skip


def outcome(run, make):
    """(what was raised, None) or (None, what came)."""
    try:
        return None, run(make)
    except Exception as error:
        return error, None


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in tensors(part)] if isinstance(result, (tuple, list)) else []


def meaning(error):
    """The message without what may differ: names of devices, and their order."""
    return re.sub(r"\b(cpu|cuda(:\d)?|meta)\b", "DEVICE", str(error).splitlines()[0])


@pytest.mark.parametrize("name", CASES)
def test_as_on_the_cpu(gpu, name):
    """CUDA tensors raise what those of the CPU raise, in the same words; else they give the same shapes and values."""
    actual, ours = outcome(CASES[name], Maker(gpu.device))
    before, cuda.twin_active = cuda.twin_active, False
    try:
        expected, result = outcome(CASES[name], Maker("cpu"))
    finally:
        cuda.twin_active = before
    assert type(actual) is type(expected), f"{actual!r} instead of {expected!r}"
    if expected is not None:
        # The CPU's kernels check offsets themselves; on a GPU Python does, before.
        said = {"varlen offsets": lambda error: re.findall("argument '.*?'", str(error))}.get(name, meaning)
        assert said(actual) == said(expected)
        return
    for a, e in zip(tensors(ours), tensors(result), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        assert torch.allclose(a.cpu().double(), e.double(), 2e-2, 2e-2, equal_nan=True)


def test_out_of_what_is_read_is_refused(gpu):
    """torch.mm(a, a, out=a) is silently wrong."""
    a = Maker(gpu.device)(4, 4)
    with pytest.raises(RuntimeError, match="'out': expected memory apart from the inputs, got an overlap with 'a'"):
        gpu.module.gemm(a, a.clone(), a)


def test_many_steps(gpu):
    """100000 steps of one sequence; a few thousand of them on the twin."""
    T = 3000 if gpu.is_twin else 100000
    make = Maker(gpu.device)
    layer = make.layer("LSTM", 2, 2)
    with torch.no_grad():
        y, (h, _) = layer(make(T, 1, 2))
    assert y.shape == (T, 1, 2) and bool(y.isfinite().all()) and torch.equal(y[-1], h[0])
