"""Bugs to plant where tensors enter the CUDA modules, in the choice of the module, and in tools/gpu_check."""

from mutation import Mutation

TENSOR = "csrc/bind/cuda_tensor.cc"
ROUTE = "python/fastdl/ops/cuda.py"
RUN = "tools/gpu_run.py"
BORDER = "tests/cuda/test_cuda_border.py"
ROUTES = "tests/cuda/test_cuda_route.py"
CHECK = "tests/test_gpu_check.py"

MUTATIONS = [
    Mutation(
        "a tensor without memory is read",
        TENSOR,
        "  if (!t.data && v.numel() > 0)",
        "  if (false)",
        f"{BORDER} -k 'twin and gemm-b-fake'",
    ),
    Mutation(
        "workspace of any dtype",
        TENSOR,
        "  if (t.dtype.code != dlpack::kUInt || t.dtype.bits != 8)",
        "  if (false)",
        f"{BORDER} -k 'twin and rnn-workspace'",
    ),
    Mutation(
        "offsets of 64 bits are read as 32",
        TENSOR,
        "  if (t.dtype.code != dlpack::kInt || t.dtype.bits != 32)",
        "  if (t.dtype.code != dlpack::kInt)",
        f"{BORDER} -k 'twin and cu_seqlens_q'",
    ),
    Mutation(
        "any dtype is float32",
        TENSOR,
        "  if (!kernel_dtype(t.dtype, &dtype)) fail_dtype(t, op, argument, kExpected);\n"
        "  return {t.data, dtype, t.ndim, t.shape, t.strides};\n}\n\nTensorView device_view_or_bool",
        "  kernel_dtype(t.dtype, &dtype);\n"
        "  return {t.data, dtype, t.ndim, t.shape, t.strides};\n}\n\nTensorView device_view_or_bool",
        f"{BORDER} -k 'twin and sum_rows and float64'",
    ),
    Mutation(
        "the rank of a gradient is not looked at",
        "csrc/bind/conv_problem.cc",
        "  if (x.size() != rank) wrong(names().x,",
        "  if (false) wrong(names().x,",
        "tests/test_conv_native.py -k another_rank",
    ),
    Mutation(
        "kernels on by default",
        ROUTE,
        "    if UNVERIFIED:",
        "    if True:",
        f"{ROUTES} -k off_by_default",
    ),
    Mutation(
        "every GPU is the first",
        ROUTE,
        "gpu_reason(device.index or 0)",
        "gpu_reason(0)",
        f"{ROUTES} -k on_each_gpu",
    ),
    Mutation(
        "GPUs of any age",
        ROUTE,
        'return "" if sm >= OLDEST_SM else',
        'return "" if sm else',
        f"{ROUTES} -k on_each_gpu",
    ),
    Mutation(
        "the twin is never left",
        ROUTE,
        "        twin_active = before\n",
        "",
        f"{ROUTES} -k the_twin_is_left_again",
        module="_twin",
    ),
    Mutation(
        "what a step started outlives it",
        RUN,
        "os.killpg(process.pid, signal.SIGKILL)",
        "process.kill()",
        f"{CHECK} -k keeps_nobody_waiting",
    ),
    Mutation(
        "time that is left is lost",
        RUN,
        "sum(weight for _, weight, _ in table[index:])",
        "sum(weight for _, weight, _ in table)",
        f"{CHECK} -k time_that_is_left",
    ),
    Mutation(
        "a crash of a test is a pass",
        "tools/gpu_check",
        "        if status in (0, 1, 5) and rows and not cut:",
        "        if status is not None and rows:",
        f"{CHECK} -k tests_that_end_their_process",
    ),
]
