"""Bugs to plant in the Python side of convolution."""

from mutation import Mutation

OPS = "python/fastdl/ops/"
CONV = "tests/test_conv.py"
CONV_INSIDE = "tests/test_conv_torch.py"
CONV_MODULES = "tests/test_conv_modules.py"

MUTATIONS = [
    Mutation(
        "padding behind counted before",
        OPS + "conv_shapes.py",
        "before, extra = tuple(x // 2 for x in total), tuple(x % 2 for x in total)",
        "before, extra = tuple((x + 1) // 2 for x in total), tuple(-(x % 2) for x in total)",
        f"{CONV} -k 'test_exact_integers and same'",
    ),
    Mutation(
        "rest of a stride lost in the gradient",
        OPS + "conv_shapes.py",
        "        return back._replace(extra=tuple(short))",
        "        return back",
        f"{CONV} -k 'test_exact_integers and rest'",
    ),
    Mutation(
        "ambiguous strides taken for channels_last",
        OPS + "conv_shapes.py",
        " or (i == 0 and least == strides[1])",
        "",
        f"{CONV} -k 'test_layout_rule_is_torchs or test_layouts_are_torchs'",
    ),
    Mutation(
        "weight gradient of a transposed convolution with operands in the other order",
        OPS + "conv.py",
        "        first, second = (input, dz) if g.transposed else (dz, input)",
        "        first, second = dz, input",
        f"{CONV} -k 'test_exact_integers and t1d'",
    ),
    Mutation(
        "activation left out of the gradient",
        OPS + "conv.py",
        "    return run.activation_grad(grad, pre, ctx.activation)\n",
        "    return grad\n",
        f"{CONV} -k test_epilogue",
    ),
    Mutation(
        "mapped weights share their groups",
        OPS + "conv_library.py",
        "_ops.conv(x, w, None, None, *rest, V * groups, *form)[0].unflatten(1, (V, -1))",
        "_ops.conv(x, w.roll(1, 0), None, None, *rest, V * groups, *form)[0].unflatten(1, (V, -1))",
        f"{CONV_INSIDE} -k test_vmap",
    ),
    Mutation(
        "mean folded with the wrong sign",
        "python/fastdl/nn/folded.py",
        "norm.bias.to(wide) - shift * scale",
        "norm.bias.to(wide) + shift * scale",
        f"{CONV_MODULES} -k test_changes_after_folding",
    ),
    Mutation(
        "a result that others want folded away",
        "python/fastdl/fold.py",
        "len(given.users) == 1 and ",
        "",
        f"{CONV_MODULES} -k test_what_is_not_folded",
    ),
    Mutation(
        "a forward that decides by its input traced once for all",
        "python/fastdl/fold.py",
        "if any(isinstance(name, ast.Name) and name.id != itself for test in tests for name in ast.walk(test)):",
        "if False:",
        "tests/test_fold.py -k test_what_a_model_computes_stays",
    ),
    Mutation(
        "a model traced itself instead of a copy",
        "python/fastdl/fold.py",
        "twin = copy.deepcopy(module, {id(p): p for p in module.parameters()}).eval()",
        "twin = module.eval()",
        "tests/test_fold.py",
    ),
    Mutation(
        "a convolution's epilogue overlooked",
        "python/fastdl/fold.py",
        "if conv is None or _only_argument(given) is None:",
        "if conv is None:",
        "tests/test_fold.py -k test_what_a_model_computes_stays",
    ),
    Mutation(
        "folded in training mode",
        "python/fastdl/nn/folded.py",
        "        if conv.training or norm.training:\n",
        "        if False:\n",
        f"{CONV_MODULES} -k 'test_folding and True-False'",
    ),
    Mutation(
        "a stale pack kept when the batch norm is loaded",
        "python/fastdl/nn/folded.py",
        '            self._fold.conv.__dict__.pop("_pack", None)  # it may be of its stock class by now\n',
        "            pass\n",
        f"{CONV_MODULES} -k test_changes_after_folding",
    ),
]
