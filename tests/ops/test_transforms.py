"""What torch asks of every op and module beside a forward and one backward: forward mode, torch.func, is_grads_batched,
torch.jit.trace, nested tensors, FlopCounterMode. Against plain expressions of torch, in float64."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils.flop_counter import FlopCounterMode

import peft_kernels as pk
from tests.checks.transforms import (
    CASES,
    LAYOUTS,
    K,
    M,
    N,
    R,
    lora_case,
    lora_module,
    numbers,
    sparse_case,
    sparse_module,
)

OPS = [name for name in CASES if "Linear" not in name and "gradient" not in name]


@pytest.fixture
def case(request):
    torch.manual_seed(0)
    return CASES[request.param]()


def every(names=tuple(CASES)):
    return pytest.mark.parametrize("case", names, indirect=True)


def squared(function):
    return lambda *operands: function(*operands).square()


@every()
def test_forward_mode_of_every_operand(case):
    """No tangent is lost, whichever operand carries it, beside operands that require gradients or not."""
    for trains in (False, True):
        operands = [operand.clone().requires_grad_(trains) for operand in case.operands]
        for i, operand in enumerate(operands):
            tangent = torch.randn_like(operand)
            results = []
            for function in (case.ours, case.plain):
                with forward_ad.dual_level():
                    given = [*operands[:i], forward_ad.make_dual(operand, tangent), *operands[i + 1 :]]
                    results.append(forward_ad.unpack_dual(function(*given)))
            torch.testing.assert_close(results[0].tangent, results[1].tangent)
            torch.testing.assert_close(results[0].primal, results[1].primal)

            found, expected = (jvp_of_one(function, operands, i, tangent) for function in (case.ours, case.plain))
            torch.testing.assert_close(found, expected)


def jvp_of_one(function, operands, i, tangent):
    def of_one(operand):
        return function(*operands[:i], operand, *operands[i + 1 :])

    return jvp(of_one, (operands[i].detach(),), (tangent,))


@every()
def test_jacobians_and_second_derivatives(case):
    where = tuple(range(len(case.operands)))
    for transform in (jacfwd, jacrev, hessian):
        found = transform(squared(case.ours), where)(*case.operands)
        torch.testing.assert_close(found, transform(squared(case.plain), where)(*case.operands))

    def norm_of_gradient(function):
        return lambda *operands: sum(
            one.square().sum() for one in grad(lambda *o: function(*o).square().sum(), where)(*operands)
        )

    found = grad(norm_of_gradient(case.ours), where)(*case.operands)
    torch.testing.assert_close(found, grad(norm_of_gradient(case.plain), where)(*case.operands))


@every()
def test_linearize(case):
    tangents = tuple(map(torch.randn_like, case.operands))
    y, along = linearize(case.ours, *case.operands)
    torch.testing.assert_close(y, case.plain(*case.operands))
    torch.testing.assert_close(along(*tangents), jvp(case.plain, case.operands, tangents)[1])


@every()
def test_gradients_of_each_sample(case):
    x, *others = case.operands
    xs, axes = torch.randn(4, *x.shape, dtype=x.dtype), (0, *(None,) * len(others))
    where = tuple(range(len(case.operands)))

    def each(function):
        gradients = grad(lambda *operands: function(*operands).square().sum(), where)
        return vmap(gradients, axes)(xs, *others), vmap(function, axes)(xs, *others)

    torch.testing.assert_close(each(case.ours), each(case.plain))


@every([*OPS, "LoRALinear"])
def test_batched_operands(case):
    """An ensemble: several models at once."""
    operands = [torch.randn(4, *operand.shape, dtype=operand.dtype) for operand in case.operands]
    torch.testing.assert_close(vmap(case.ours)(*operands), vmap(case.plain)(*operands))


def test_an_ensemble_of_sparse_deltas_writes_nothing():
    layer = sparse_module()
    before, values, x = layer.weight.detach().clone(), numbers(4, layer.layout.nnz), numbers(M, K)
    ys = vmap(lambda values: functional_call(layer, {"deltas.default.values": values}, (x,)))(values)
    assert torch.equal(layer.weight, before)
    for one, y in zip(values, ys):
        weight = before.clone()
        layer.layout.put_(weight, layer.base + one)
        torch.testing.assert_close(y, F.linear(x, weight, layer.bias))


@every()
def test_is_grads_batched(case):
    leaves = [operand.clone().requires_grad_() for operand in case.operands]
    results = []
    for function in (case.ours, case.plain):
        y = function(*leaves)
        torch.manual_seed(1)
        grads = torch.randn(4, *y.shape, dtype=y.dtype)
        results.append(torch.autograd.grad(y, leaves, grads, is_grads_batched=True, allow_unused=True))
    torch.testing.assert_close(results[0], results[1])


@every()
def test_backward_outside_of_what_differentiates_it(case):
    """A backward that would lose a tangent, or be differentiated again, says so: it never counts as zero."""
    leaves = [operand.clone().requires_grad_() for operand in case.operands]
    composed = case.ours(*leaves)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(composed), torch.ones_like(composed))
        with pytest.raises(RuntimeError, match="expected a forward inside of the dual level"):
            torch.autograd.grad(composed, leaves[1:], dual)
    for function in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        with pytest.raises(RuntimeError, match="differentiate twice"):
            function(lambda *operands: case.ours(*operands).square().sum(), tuple(leaves), tuple(case.operands))
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.functional.jvp(case.ours, tuple(leaves), tuple(case.operands))


@every(OPS)
def test_a_backend_that_is_forced(case):
    with pk.use_backend("triton"):
        for transform in (jacfwd, jacrev, lambda function: vmap(function, (0, *(None,) * (len(case.operands) - 1)))):
            with pytest.raises(RuntimeError, match="expected backend 'auto' or 'reference' for"):
                transform(case.ours)(*case.operands)


@every(OPS)
def test_wrong_operands_get_their_line(case):
    with pytest.raises(ValueError, match="expected"):
        jvp(lambda x: case.ours(x, *case.operands[1:]), (numbers(M, K + 1),), (numbers(M, K + 1),))


@every([name for name in OPS if name != "a scaling a row"])
def test_under_autocast(case):
    operands = [operand.float() for operand in case.operands]
    with torch.autocast("cpu", torch.bfloat16):
        y, tangent = jvp(case.ours, tuple(operands), tuple(operands))
        assert y.dtype == tangent.dtype == torch.bfloat16
        torch.testing.assert_close(y, case.ours(*operands), rtol=2e-2, atol=0.2)
        torch.testing.assert_close(tangent, jvp(case.plain, tuple(operands), tuple(operands))[1], rtol=2e-2, atol=0.2)


def test_float32_adapters_beside_a_16_bit_base():
    x, weight = numbers(M, K).bfloat16(), numbers(N, K).bfloat16()
    lora_A, lora_B = numbers(R, K).float(), numbers(N, R).float()
    for precision in ("default", "high"):

        def function(lora_A, lora_B, precision=precision):
            return pk.lora_linear(x, weight, lora_A, lora_B, 0.5, adapter_precision=precision)

        y, tangent = jvp(function, (lora_A, lora_B), (lora_A, lora_B))
        torch.testing.assert_close(y, function(lora_A, lora_B), rtol=2e-2, atol=0.05)
        low = 0.5 * F.linear(F.linear(x.double(), lora_A.double()), lora_B.double())
        torch.testing.assert_close(tangent.double(), 2 * low, rtol=3e-2, atol=0.05)
        exact = (torch.float64, torch.float32) if precision == "high" else (torch.float64,)
        for dtype in exact:  # of operands of one dtype the precision changes nothing
            wide = [one.to(dtype) for one in (x, weight, lora_A, lora_B)]
            y = vmap(lambda x, wide=wide: pk.lora_linear(x, *wide[1:], 0.5, adapter_precision="high"))(wide[0][None])
            plain = F.linear(wide[0], wide[1]) + 0.5 * F.linear(F.linear(wide[0], wide[2]), wide[3])
            torch.testing.assert_close(y[0], plain)
        grads = grad(lambda *adapters: function(*adapters).float().sum(), (0, 1))(lora_A, lora_B)
        assert [one.dtype for one in grads] == [torch.float32] * 2


def test_infinite_scores_and_weights_of_a_mask():
    """What is masked takes no part, whatever stands there."""
    x, weight, scores = numbers(M, K), numbers(N, K), numbers(N, K)
    scores[0, 0], scores[1, 1], weight[0, 0] = -torch.inf, torch.inf, torch.inf
    y, tangent = jvp(lambda x: pk.masked_linear(x, weight, scores), (x,), (x,))
    torch.testing.assert_close(y, pk.masked_linear(x, weight, scores))
    torch.testing.assert_close(y, tangent)
    traced = torch.jit.trace(lambda x: pk.masked_linear(x, weight, scores), (x,))
    torch.testing.assert_close(traced(x), y)


class TestDropout:
    x, weight, lora_A, lora_B = numbers(4, K), numbers(N, K), numbers(R, K), numbers(N, R)

    def drop(self, x, lora_A):
        return pk.lora_linear(x, self.weight, lora_A, self.lora_B, 2.0, dropout_p=0.5, training=True)

    def seeded(self, function):
        torch.manual_seed(3)
        return function()

    def test_the_mask_of_the_kernels(self):
        expected = self.seeded(lambda: self.drop(self.x, self.lora_A))
        y, tangent = self.seeded(lambda: jvp(lambda lora_A: self.drop(self.x, lora_A), (self.lora_A,), (self.lora_A,)))
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(tangent, expected - F.linear(self.x, self.weight))

    def test_masks_of_projections_that_share_x(self):
        given = [pk.Projection(self.weight, self.lora_A, self.lora_B, 2.0) for _ in range(2)]
        for shared in (True, False):

            def function(x, shared=shared):
                options = dict(dropout_p=0.5, training=True, shared_dropout=shared)
                return torch.stack(pk.lora_linear_shared_input(x, given, **options))

            expected = self.seeded(lambda function=function: function(self.x))
            y, tangent = self.seeded(lambda function=function: jvp(function, (self.x,), (self.x,)))
            torch.testing.assert_close((y, tangent), (expected, expected))
            assert torch.equal(y[0], y[1]) == shared

    @pytest.mark.parametrize("randomness", ["error", "same", "different"])
    def test_randomness_of_vmap(self, randomness):
        """As of F.dropout."""
        xs = self.x.expand(3, *self.x.shape)
        for function in (lambda x: self.drop(x, self.lora_A), lambda x: F.dropout(x, 0.5)):
            if randomness == "error":
                with pytest.raises(RuntimeError, match="randomness"):
                    vmap(function, randomness=randomness)(xs)
                continue
            ys = vmap(function, randomness=randomness)(xs)
            assert torch.equal(ys[0], ys[1]) == (randomness == "same")

    def test_each_sample_has_a_mask(self):
        """Of randomness="different": every one is a mask of the kernels, of a seed of its own."""
        xs, zero = self.x.expand(3, *self.x.shape), torch.zeros_like(self.weight)
        ys = vmap(
            lambda x: pk.lora_linear(x, zero, torch.eye(K).double(), torch.eye(N, K).double(), 1.0,
                                     dropout_p=0.5, training=True), randomness="different"
        )(xs)  # fmt: skip
        kept = ys != 0
        torch.testing.assert_close(ys[kept], 2 * xs[..., :N][kept])
        assert 0.2 < kept.double().mean() < 0.8


@every([name for name in CASES if "Linear" not in name and name != "a scaling a row"])
def test_trace(case):
    """With other leading dimensions than those it was traced with, without a warning, checked by torch, and of nothing
    but torch's own operations."""
    others = case.operands[1:]
    traced = trace(lambda x: case.ours(x, *others), numbers(3, 5, K))
    for x in (numbers(7, 2, K), numbers(1, 1, K), numbers(2, 0, K)):
        torch.testing.assert_close(traced(x), case.plain(x, *others))
    assert {node.kind().partition("::")[0] for node in traced.graph.nodes()} <= {"aten", "prim"}


def trace(function, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        return torch.jit.trace(function, (x,))


@pytest.mark.parametrize("module", [lora_module, sparse_module], ids=["LoRALinear", "SparseDeltaLinear"])
@pytest.mark.parametrize("trains", [True, False])
def test_trace_of_a_module(module, trains, tmp_path):
    layer = module().requires_grad_(trains)
    traced = trace(layer, numbers(3, 5, K))
    traced.save(tmp_path / "traced.pt")
    for one in (traced, torch.jit.load(tmp_path / "traced.pt")):
        for x in (numbers(7, 2, K), numbers(1, 1, K), numbers(3, 0, K)):
            torch.testing.assert_close(one(x), layer(x))
    if trains:
        x = numbers(2, 3, K)
        leaves = [p for p in layer.parameters() if p.requires_grad]
        found = torch.autograd.grad(traced(x).square().sum(), leaves, allow_unused=True)
        expected = torch.autograd.grad(layer(x).square().sum(), leaves, allow_unused=True)
        torch.testing.assert_close(found, expected)


def test_trace_with_dropout():
    layer = pk.nn.LoRALinear(K, N, R, lora_dropout=0.5, dtype=torch.float64)
    torch.nn.init.normal_(layer.lora_B)
    traced = torch.jit.trace(layer, (numbers(3, K),), check_trace=False)
    x = numbers(5, K)
    assert not torch.equal(traced(x), traced(x)) and traced(x).shape == (5, N)


def nested(layout, parts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # strided ones are a prototype, says torch
        return torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)


@every(["lora_linear", *(n for n in OPS if "delta" in n), "masked_linear", "LoRALinear", "SparseDeltaLinear, entries"])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested(case, layout):
    parts = [numbers(3, K), numbers(5, K)]
    x, others = nested(layout, parts), [operand.clone().requires_grad_() for operand in case.operands[1:]]
    y = case.ours(x, *others)
    assert y.layout == layout and y.is_nested
    again = [part.requires_grad_() for part in parts]
    expected = [case.plain(part, *others) for part in again]
    torch.testing.assert_close(list(y.unbind()), expected)
    found = torch.autograd.grad(sum(one.square().sum() for one in y.unbind()), [x, *others])
    grads = torch.autograd.grad(sum(one.square().sum() for one in expected), [*again, *others])
    torch.testing.assert_close([*found[0].unbind(), *found[1:]], list(grads))
    if layout == torch.jagged:
        assert (y + F.linear(x, numbers(N, K))).shape == y.shape  # of the same lengths


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_shared_input_and_dropout(layout):
    parts = [numbers(3, K), numbers(5, K)]
    given = [pk.Projection(numbers(n, K), numbers(R, K), numbers(n, R), 2.0) for n in (6, 4)]
    options = dict(dropout_p=0.5, training=True)
    torch.manual_seed(1)
    ys = pk.lora_linear_shared_input(nested(layout, parts), given, **options)
    torch.manual_seed(1)
    for y, expected in zip(ys, pk.lora_linear_shared_input(torch.cat(parts), given, **options)):
        torch.testing.assert_close(torch.cat(y.unbind()), expected)


def test_nested_that_is_refused():
    x = nested(torch.jagged, [numbers(3, K), numbers(5, K)])
    weight, lora_A, lora_B = numbers(N, K), numbers(R, K), numbers(N, R)
    with pytest.raises(ValueError, match="whose last dimension has one size"):
        pk.lora_linear(x.transpose(1, 2), weight, lora_A, lora_B, 1.0)
    with pytest.raises(ValueError, match=r"expected a y made of x.values\(\), got nested"):
        layout = LAYOUTS["entries"]
        pk.with_sparse_gradient_(F.linear(x, weight), x, numbers(layout.nnz), layout)
    ragged = nested(torch.strided, [numbers(3, K), numbers(5, K + 1)])
    with pytest.raises(ValueError, match="of one K in a nested x"):
        pk.lora_linear(ragged, weight, lora_A, lora_B, 1.0)


def test_nested_and_compiled():
    torch._dynamo.reset()
    case = lora_case()
    x = nested(torch.jagged, [numbers(3, K), numbers(5, K)]).detach()
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    y = compiled(x, *case.operands[1:])
    torch.testing.assert_close(y.values(), case.plain(x.values(), *case.operands[1:]))


def flops(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@every(["lora_linear", "a scaling a row", "lora_linear_shared_input", "masked_linear", "LoRALinear"])
def test_flops_are_those_of_the_expression(case):
    """Forward and backward, of every subset of gradients."""
    count = len(case.operands)
    for trains in itertools.product((False, True), repeat=min(count, 5)):
        leaves = [one.clone().requires_grad_(needs) for one, needs in zip(case.operands, (*trains, *(False,) * count))]

        def step(function, leaves=leaves):
            y = function(*leaves)
            if y.requires_grad:
                y.sum().backward()

        found, expected = (flops(lambda function=function: step(function)) for function in (case.ours, case.plain))
        assert found == expected, trains


@pytest.mark.parametrize("kind", LAYOUTS)
def test_flops_of_sparse_deltas(kind):
    """Dense products of forward, dx and dW, and for each value a dot product over the tokens, whatever computes it."""
    case, nnz, dense = sparse_case(kind), LAYOUTS[kind].nnz, 2 * M * N * K
    for x, weight, values, bias in itertools.product((False, True), repeat=4):
        leaves = [one.clone().requires_grad_(n) for one, n in zip(case.operands, (x, weight, values, bias))]

        def step(leaves=leaves):
            y = case.ours(*leaves)
            if y.requires_grad:
                y.sum().backward()

        assert flops(step) == dense * (1 + x + weight) + 2 * M * nnz * values
    layer = sparse_module(kind)
    assert flops(lambda: layer(case.operands[0]).sum().backward()) == dense + 2 * M * nnz


@every(["lora_linear", "sparse_delta_linear, entries", "masked_linear"])
def test_flops_of_a_compiled_op(case):
    """Of the graphs themselves, run under the counter: what is compiled runs uncompiled under any mode, says torch."""
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    counts = []

    def counted(graph, inputs):
        def run(*args):
            with FlopCounterMode(display=False) as counter:
                results = graph(*args)
            counts.append(counter.get_total_flops())
            return results

        return run

    leaves = [operand.float().requires_grad_() for operand in case.operands]
    expected = flops(lambda: case.ours(*leaves).sum().backward())
    compiled = torch.compile(case.ours, fullgraph=True, backend=aot_autograd(fw_compiler=counted, bw_compiler=counted))
    compiled(*leaves).sum().backward()
    assert len(counts) == 2 and sum(counts) == expected


@every(OPS)
@pytest.mark.parametrize("transform", ["jvp", "vmap", "jacrev", "each sample"])
def test_transforms_compile(case, transform):
    torch._dynamo.reset()
    x, *others = case.operands
    function = {
        "jvp": lambda x: jvp(lambda x: case.ours(x, *others), (x,), (x,)),
        "vmap": vmap(lambda x: case.ours(x, *others)),
        "jacrev": jacrev(lambda x: case.ours(x, *others)),
        "each sample": vmap(grad(lambda x: case.ours(x, *others).square().sum())),
    }[transform]
    x = numbers(4, *x.shape) if transform in ("vmap", "each sample") else x
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


def test_a_compiled_op_inside_of_a_dual_level():
    """What is compiled outside is compiled anew, and loses no tangent."""
    torch._dynamo.reset()
    case = lora_case()
    compiled = torch.compile(case.ours, backend="eager")
    torch.testing.assert_close(compiled(*case.operands), case.plain(*case.operands))
    x, *others = case.operands
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, x), *others)).tangent
    torch.testing.assert_close(found, F.linear(x, others[0]) + 2 * F.linear(F.linear(x, others[1]), others[2]))


def test_a_copy_of_a_module_is_transformed_as_well():
    layer = copy.deepcopy(lora_module())
    x = numbers(M, K)
    torch.testing.assert_close(jvp(layer, (x,), (x,))[1], layer(x) - layer.bias)
