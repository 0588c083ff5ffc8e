"""What torch counts of a piece of code, with right formulas where torch has none or a wrong one."""

from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def attention(query, key, value, *_, **__):
    return sdpa_flop_count(query, key, value)


def attention_backward(grad, query, key, value, *_, **__):
    # The four products that make the gradients. torch adds a fifth, the scores, which fused kernels compute again.
    return 2 * sdpa_flop_count(query, key, value)


def convolution_backward(grad, x, weight, bias, stride, padding, dilation, transposed, out, groups, mask, *_, **__):
    # Each of the two gradients takes the multiplications of the forward pass. torch has that of the weights cost
    # as many times that as there are groups, see below.
    return (mask[0] + mask[1]) * 2 * prod(weight) * grad[0] * prod((x if transposed else grad)[2:])


FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    torch.ops.aten.convolution_backward: convolution_backward,
}


def counted(run, formulas=FORMULAS):
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()
