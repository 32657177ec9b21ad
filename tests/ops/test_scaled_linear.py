"""The scaled linear op on the CPU: what is special to it. What every op with one x and one y is held to is in
`test_contract.py`."""

import pytest
import torch
from peft import IA3Config, get_peft_model

import peft_kernels as pk
from peft_kernels.testing.scaled_linear import make_case, ours


@pytest.mark.parametrize("feedforward", [False, True])
def test_equals_peft(feedforward):
    """Its IA3 layer: on the output, or on the input of a feed-forward layer."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 16)).double()
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [], init_ia3_weights=False)
    model = get_peft_model(base, config).double()
    layer = model.get_base_model()[0]
    scale = layer.ia3_l["default"]
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, scale])
    y = pk.scaled_linear(x, layer.base_layer.weight, scale.flatten(), layer.base_layer.bias, scale_input=feedforward)
    torch.testing.assert_close(y, model(x))
    for one, other in zip(torch.autograd.grad(y.square().sum(), [x, scale]), expected):
        torch.testing.assert_close(one, other)


def test_a_scale_in_other_16_bits_is_refused():
    case = make_case(dtype=torch.float16, scale_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected scale \[16\] in x's dtype torch.float16 or float32, got \[16\] bf"):
        ours(case, case.operands())
