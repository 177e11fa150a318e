"""Peak memory of attention, forward and backward: at most results + the plan's workspace (+ 4 MiB of noise).

Prints one line a case: extra bytes held at the peak, the bytes allowed. The scores of one head are 64 MiB: any of them
kept, or a mask repeated for each head, shows.
"""

import sys
from functools import partial

import torch
from peak_memory import CLEAR, check, peak_of

from fastdl import _C
from fastdl.functional import attention_varlen, scaled_dot_product_attention

HEADS, LENGTH, D = 2, 4096, 64


def case(name, attend, tensors, plan_of, lse_rows):
    """attend(*tensors) and its gradients; plan_of(backward=...): the plan."""
    results = []
    size = tensors[0].numel() * tensors[0].element_size()  # of the result as of query
    allowed = size + 8 * lse_rows + plan_of(backward=False)["workspace_bytes"]
    check(f"{name} forward", lambda: results.append(attend(*tensors)), allowed)
    grad = torch.ones_like(results[0])
    allowed = sum(x.numel() * x.element_size() for x in tensors) + plan_of(backward=True)["workspace_bytes"]
    check(f"{name} backward", lambda: torch.autograd.grad(results[0], tensors, grad), allowed)


def main():
    torch.manual_seed(1)
    allocated, _ = peak_of(lambda: torch.ones(8 << 20))
    assert allocated >= 32 << 20, f"32 MiB were allocated, {allocated} bytes seen: this measure sees nothing"
    x = torch.ones(1, HEADS, 512, D, requires_grad=True)  # what the first calls load and start
    torch.autograd.grad(scaled_dot_product_attention(x, x, x), x, x.detach())
    mask = torch.zeros(1, 1, LENGTH, LENGTH)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.randn(1, LENGTH, HEADS, D).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
        plan = partial(_C.attention_plan, *(x.detach() for x in tensors))
        for name, options, native in (
            ("plain", {}, {}),
            ("causal", {"is_causal": True}, {"hi": 0}),
            ("dropout", {"dropout_p": 0.5}, {"dropout_p": 0.5}),
            ("mask", {"attn_mask": mask}, {"mask": mask.expand(1, HEADS, -1, -1)}),
        ):
            attend = partial(scaled_dot_product_attention, **options)
            case(f"{name} {dtype}", attend, tensors, partial(plan, **native), HEADS * LENGTH)
        cu = torch.tensor([0, 5, LENGTH], dtype=torch.int32)
        packed = [x.detach()[0].transpose(0, 1).requires_grad_() for x in tensors]
        case(
            f"varlen {dtype}",
            lambda q, k, v, cu=cu: attention_varlen(q, k, v, cu, cu),
            packed,
            partial(plan, cu_seqlens_q=cu, cu_seqlens_k=cu, align_end=True),
            HEADS * LENGTH,
        )
        # One query: K and V are 32 MiB each in float32 and pass through in place.
        q, k, v = (torch.randn(1, heads, rows, 128).to(dtype) for heads, rows in ((32, 1), (8, 8192), (8, 8192)))
        allowed = q.numel() * q.element_size() + _C.attention_plan(q, k, v)["workspace_bytes"]
        decode = partial(scaled_dot_product_attention, q, k, v, enable_gqa=True)
        check(f"decode {dtype}", decode, allowed)


if __name__ == "__main__":
    if not CLEAR.exists():
        print("SKIP: no /proc/self/clear_refs")
        sys.exit(0)
    main()
