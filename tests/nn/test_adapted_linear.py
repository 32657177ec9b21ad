"""The linear layers with an adapter: that they stand wherever an `nn.Linear` stood, merge, save and load."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import peft_kernels as pk

LAYERS = {
    "LoRALinear": (pk.nn.LoRALinear, {"r": 4, "lora_alpha": 8}),
    "ScaledLinear": (pk.nn.ScaledLinear, {}),
    "ScaledLinear, input": (pk.nn.ScaledLinear, {"scale_input": True}),
}
X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=LAYERS)
def kind(request):
    return LAYERS[request.param]


def make(kind, dtype=None, **more):
    """A layer whose adapter matters."""
    torch.manual_seed(0)
    cls, options = kind
    layer = cls(24, 16, dtype=dtype, **(options | more))
    for name in layer.adapter:
        nn.init.normal_(getattr(layer, name))
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_freezes_and_starts_as_its_base(kind, bias):
    cls, options = kind
    linear = nn.Linear(24, 16, bias=bias).eval()
    layer = cls.from_linear(linear, **options)
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (24, 16)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == set(layer.adapter)
    assert ("bias" in layer.state_dict()) == bias
    torch.testing.assert_close(layer(X), linear(X))


def test_from_linear_wants_a_plain_linear(kind):
    cls, options = kind
    with pytest.raises(ValueError, match=r"expected a plain nn.Linear, got Conv1d"):
        cls.from_linear(nn.Conv1d(4, 4, 1), **options)
    with pytest.raises(ValueError, match=rf"expected a plain nn.Linear, got {cls.__name__}"):
        cls.from_linear(make(kind), **options)


def test_trains(kind):
    layer = make(kind)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        loss = layer(X).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_and_unmerge(kind, dtype, bias):
    layer = make(kind, dtype, bias=bias)
    y, x = layer(X.to(dtype)), X.to(dtype)
    own = {name: parameter for name, parameter in layer.named_parameters() if name not in layer.adapter}
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    layer.merge()
    assert layer.merged and layer.weight is not own["weight"]
    assert all(torch.equal(own[name], before[name]) for name in own), "what others share stays as it is"
    tolerance = {torch.bfloat16: 0.06, torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    torch.testing.assert_close(layer(x), y, rtol=tolerance, atol=tolerance)
    changed = [name for name in own if getattr(layer, name) is not own[name]]
    size = sum(own[name].numel() * own[name].element_size() for name in changed)
    assert f"merged (base weight kept on cpu, {size} bytes)" in repr(layer)
    layer.unmerge()
    assert not layer.merged
    for name in own:
        assert torch.equal(getattr(layer, name), before[name])
        assert getattr(layer, name).data_ptr() == own[name].data_ptr()
    assert torch.equal(layer(x), y)


def test_merge_errors(kind):
    layer = make(kind)
    with pytest.raises(RuntimeError, match="expected a merged layer"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="expected an unmerged layer"):
        layer.merge()


def test_loads_a_plain_linear_checkpoint(kind):
    linear, layer = nn.Linear(24, 16), make(kind)
    adapter = {name: getattr(layer, name).clone() for name in layer.adapter}
    layer.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(layer.weight, linear.weight)
    assert all(torch.equal(getattr(layer, name), values) for name, values in adapter.items())
    nested = nn.Sequential(make(kind), nn.ReLU())
    nested.load_state_dict(nn.Sequential(linear, nn.ReLU()).state_dict(), strict=True)
    assert torch.equal(nested[0].weight, linear.weight)


def test_state_dict_round_trip_and_missing_keys(kind):
    layer, other = make(kind), kind[0](24, 16, **kind[1])
    state = layer.state_dict()
    assert set(state) == {"weight", "bias", *layer.adapter}
    other.load_state_dict(state)
    assert torch.equal(other(X), layer(X))
    if len(layer.adapter) > 1:
        del state[layer.adapter[-1]]
        with pytest.raises(RuntimeError, match=layer.adapter[-1]):
            other.load_state_dict(state)


def test_merged_state_dict_holds_the_base(kind):
    layer = make(kind)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.merge()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key]), key
    layer.load_state_dict(state)
    assert not layer.merged


@pytest.mark.parametrize("merged", [False, True])
def test_copies(kind, merged):
    layer = make(kind).eval()
    if merged:
        layer.merge()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is type(layer)
        assert torch.equal(other(X), layer(X))
        assert all(getattr(other, name) is not getattr(layer, name) for name in layer.adapter)
        if merged:
            other.unmerge()
            assert torch.equal(other.weight, layer.unmerged_weight)


def test_moves_as_a_whole(kind):
    layer = make(kind).double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    layer.merge()
    assert layer.to(torch.float32).unmerged_weight.dtype == torch.float32


def test_float32_adapters_beside_a_16_bit_base(kind):
    layer = make(kind, torch.bfloat16, adapter_dtype=torch.float32)
    y = layer(X.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert {getattr(layer, name).grad.dtype for name in layer.adapter} == {torch.float32}
    with pytest.raises(ValueError, match=r"adapter_dtype as the weight's, torch.float32, got torch.float16"):
        make(kind, torch.float32, adapter_dtype=torch.float16)


def test_compiles(kind):
    torch._dynamo.reset()
    layer = make(kind)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(X), layer(X))


def test_ist_finds_its_adapters(kind):
    blocks = nn.ModuleList(make(kind) for _ in range(4))
    model = nn.ModuleDict({"blocks": blocks})
    ist = pk.ist.IST(model, pk.ist.ISTConfig(sampler="rst"))
    for block, layer in zip(blocks, ist.layers, strict=True):
        own = [getattr(block, name) for name in block.adapter]
        assert len(own) == len(layer.parameters) and all(a is b for a, b in zip(own, layer.parameters))
    ist.before_step()
    assert sum(ist.updates) == 1


def test_ist_cannot_damp_a_scaled_layer():
    blocks = nn.ModuleList(make(LAYERS["ScaledLinear"]) for _ in range(4))
    with pytest.raises(ValueError, match=r"expected adapters with a scaling to damp in blocks\.0, found none"):
        pk.ist.IST(nn.ModuleDict({"blocks": blocks}))


def test_extra_repr():
    assert repr(make(LAYERS["ScaledLinear, input"])) == (
        "ScaledLinear(in_features=24, out_features=16, bias=True, scale_input=True)"
    )
