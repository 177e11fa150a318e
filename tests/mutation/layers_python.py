"""Bugs to plant in what all layers share on the Python side."""

from mutation import Mutation

OPS = "python/fastdl/ops/"
LAYERS = "tests/test_every_layer.py"

MUTATIONS = [
    Mutation(
        "a compiled call given one tensor twice",
        OPS + "route.py",
        "any(x is y for y in args[:i])",
        "any(x is y for y in args[:0])",
        f"{LAYERS} -k twice",
    ),
    Mutation(
        "saved tensors read a second time",
        OPS + "fused.py",
        "dz = activation_gradient(ctx.activation, grad, saved, run)",
        "dz = activation_gradient(ctx.activation, grad, ctx.saved_tensors, run)",
        f"{LAYERS} -k checkpoint",
    ),
    Mutation(
        "a result that was written taken for what it was",
        OPS + "rnn.py",
        "if ctx.witness._version != ctx.version:",
        "if ctx.witness._version < ctx.version:",
        f"{LAYERS} -k may_be_written",
    ),
    Mutation(
        "the gradient of a mask of no heads left as memory was",
        OPS + "attention_native.py",
        "        dmask.zero_()",
        "        pass",
        "tests/test_attention.py -k no_heads",
    ),
]
