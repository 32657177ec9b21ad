"""The model of the benchmark's providers: its launches are those that torch runs, its multiples those of theory."""

import argparse
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import lora, model, sparse_delta
from benchmarks.model import lora_launches, sparse_launches
from benchmarks.model.ceilings import PUBLISHED, ceilings_of_gpu
from benchmarks.model.launches import gemm, limits, timed
from benchmarks.model.predict import floor_us
from benchmarks.providers import BARE, EAGER, PEFT, all_providers
from benchmarks.registry import BACKWARD, BOTH, FORWARD, STEP
from benchmarks.sparse_delta import Pattern, Work
from benchmarks.sparse_providers import DENSE, SCATTER, SHIRA, makers
from peft_kernels.ops.lora_linear import reference

OP = "lora_linear"
REFERENCE = lora.Shape(8192, 4096, (4096,), 16, torch.bfloat16)
DROPPING = replace(REFERENCE, p=0.1)
SHARED = replace(REFERENCE, Ns=(4096, 1024, 1024))
H200 = ceilings_of_gpu("h200")
GAPLESS = H200 | {"gap_us": 0.0}
PEFT_F32 = f"{PEFT} f32"


def multiple(shape, provider, mode=BOTH):
    """Of the base GEMMs, without gaps between launches."""
    return model.predicted(OP, shape, provider, mode, GAPLESS) / model.predicted(OP, REFERENCE, BARE, mode, GAPLESS)


# --- What theory says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "shape", "expected"),
    [
        (EAGER, REFERENCE, 1.36),
        (EAGER, DROPPING, 1.47),
        (PEFT, REFERENCE, 1.36),
        (PEFT, DROPPING, 1.47),
        (PEFT_F32, REFERENCE, 1.63),
        ("Unsloth", REFERENCE, 1.23),
        ("Axolotl-style", REFERENCE, 1.20),
        ("Axolotl-style", DROPPING, 1.40),
        ("ours, triton:blas", REFERENCE, 1.11),
        ("LoRAFusion's kernels", REFERENCE, 1.07),
        ("LoRAFusion's kernels", DROPPING, 1.14),
        ("ideal passes, mask of bits", DROPPING, 1.08),
        ("all passes hidden", REFERENCE, 1.01),
    ],
)
def test_multiples_at_the_reference_shape(provider, shape, expected):
    """Within 1.5 %: the figures are of passes over x and dy alone, the launches also count S, A, B, partial sums."""
    assert multiple(shape, provider) == pytest.approx(expected, rel=0.015)


def test_our_launches_are_counted_as_the_kernels_are():
    """By the op's README: launches forward and backward, without and with dropout; one layer, then q/k/v together.
    Native kernels have one more backward, as the pass over x counts with the GEMM that it runs beside."""
    counted = {
        "ours, triton:blas": [(4, 6), (5, 6), (9, 10), (9, 10)],
        "ours, triton:fused": [(3, 5), (4, 5), (6, 7), (6, 7)],
        "ours, cuda:passes": [(3, 4), (4, 4), (7, 7), (8, 7)],
        "ours, cuda:fused": [(1, 4), (4, 4), (7, 7), (8, 7)],
    }
    for provider, expected in counted.items():
        found = [
            model.launches_of(OP, replace(shape, p=p), provider, H200)
            for shape in (REFERENCE, SHARED)
            for p in (0.0, 0.1)
        ]
        assert [(len(passes.forward), len(passes.backward)) for passes in found] == expected


def test_launches_by_hand():
    x, W, S, A = 2 * 8192 * 4096, 2 * 4096 * 4096, 2 * 8192 * 16, 2 * 16 * 4096
    base, shrink, expand, scaled, added = model.launches_of(OP, REFERENCE, EAGER, H200).forward
    assert (base.flops, base.read, base.written) == (2 * 8192 * 4096 * 4096, x + W, x)
    assert (shrink.flops, shrink.read, shrink.written) == (2 * 8192 * 4096 * 16, x + A, S)
    assert (expand.read, expand.written) == (S + A, x)
    assert (scaled.flops, scaled.read, scaled.written) == (0, x, x)
    assert (added.read, added.written) == (2 * x, x)
    *_, onto = model.launches_of(OP, REFERENCE, "ours, triton:blas", H200).forward
    assert (onto.read, onto.written) == (x + W + x, x)
    shrink = model.launches_of(OP, DROPPING, "ours, triton:fused", H200).forward[1]
    assert shrink.written == 2 * 4 * 8192 * 16 + 8192 * 4096 // 8  # two partial sums of S, a mask of bits
    assert shrink.draws == 8192 * 4096 // 2  # 16 bits an element


def test_the_time_of_a_launch():
    ceilings = {"torch.bfloat16": 1e12, "bytes": 1e9, "gap_us": 2.0, "l2": 400_000}
    one = gemm("one", 100, 100, 100, 2)
    assert limits(one, torch.bfloat16, ceilings) == pytest.approx({"FLOPs": 2.0, "bytes": 60.0, "draws": 0.0})
    after = [µs for _, _, µs in timed([one, one], torch.bfloat16, ceilings)]
    assert after == pytest.approx([62.0, 42.0])  # what the first has written is in the cache
    too_small = ceilings | {"l2": 39_999}
    assert [µs for _, _, µs in timed([one, one], torch.bfloat16, too_small)] == pytest.approx([62.0, 62.0])


@pytest.mark.parametrize("shape", [REFERENCE, SHARED])
@pytest.mark.parametrize("mode", [FORWARD, BACKWARD, BOTH])
def test_the_base_is_that_of_the_benchmark(shape, mode):
    passes = model.launches_of(OP, shape, BARE, H200)
    parts = {FORWARD: passes.forward, BACKWARD: passes.backward, BOTH: [*passes.forward, *passes.backward]}
    assert sum(launch.flops for launch in parts[mode]) == lora.base_flops(shape, mode)


@pytest.mark.parametrize("provider", [*lora_launches.PROVIDERS, *lora_launches.DESIGNS])
def test_nobody_computes_less_than_there_is_to_compute(provider):
    passes = model.launches_of(OP, REFERENCE, provider, H200)
    least = lora.base_flops(REFERENCE, BOTH) if provider == BARE else lora.flops(REFERENCE, BOTH)
    assert sum(launch.flops for part in passes[:2] for launch in part) >= least


@pytest.mark.parametrize("gpu", PUBLISHED)
def test_more_tokens_take_longer(gpu):
    ceilings, tokens = ceilings_of_gpu(gpu), (1, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)
    for provider in lora_launches.PROVIDERS:
        for p in (0.0, 0.1):
            found = [model.predicted(OP, replace(REFERENCE, M=M, p=p), provider, BOTH, ceilings) for M in tokens]
            known = [µs for µs in found if µs is not None]
            assert known == sorted(known), provider
    for provider in sparse_launches.PROVIDERS:
        work = Work(sparse_delta.Shape(8192, 4096, 4096, torch.bfloat16), Pattern("entries", 1.0))
        found = [
            model.predicted("sparse_delta", work._replace(shape=work.shape._replace(M=M)), provider, STEP, ceilings)
            for M in tokens
        ]
        assert found == sorted(found), provider


def test_modes_add_up():
    for provider in (BARE, PEFT, "ours, triton:fused"):
        one, other, both = (model.predicted(OP, DROPPING, provider, mode, H200) for mode in (FORWARD, BACKWARD, BOTH))
        assert both == pytest.approx(one + other)


def test_the_h200_is_the_measured_one():
    assert (H200["torch.bfloat16"], H200["bytes"]) == pytest.approx((790e12, 4.3e12))
    assert ceilings_of_gpu("h100")["bytes"] < H200["bytes"]


# --- What torch says -----------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """Bytes read and written by each operation of torch that is more than a view, or by those with the names alone."""

    def __init__(self, names=()):
        super().__init__()
        self.names, self.moved = names, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "peft_kernels":  # ours is one operation while a mode is active: what it is made of counts
            with self:
                return getattr(reference, func.overloadpacket.__name__.removeprefix("lora_linear_"))(*args)
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        without = func.is_view or name in ("detach", "_unsafe_view", "new_empty", "empty")
        if name in self.names or not (self.names or without):
            read, written = (
                sum(leaf.nbytes for leaf in tree_leaves(side) if isinstance(leaf, torch.Tensor) and leaf.dim())
                for side in (args, result)
            )
            self.moved[read, written] += bool(written)  # not of a number that becomes a tensor
        return result


def moved(passes):
    return Counter((launch.read, launch.written) for part in passes[:2] for launch in part)


RUN_BY_TORCH = {BARE, EAGER, PEFT, PEFT_F32, "Axolotl-style", "LoRAFusion-style", "ours, reference"}
SMALL = lora.Shape(128, 96, (80,), 24, torch.bfloat16)  # no two matrices of one size; M·K·R is not tiny


@pytest.mark.parametrize("provider", sorted(RUN_BY_TORCH))
@pytest.mark.parametrize("Ns", [(80,), (80, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_launches_are_what_torch_runs(provider, Ns, dtype):
    """Operation by operation, by the bytes that each reads and writes."""
    found = next(one for one in all_providers("cpu") if one.name == provider)
    if found.why_not or (found.sixteen_bits and dtype == torch.float32):
        pytest.skip(found.why_not or "for a 16-bit base")
    shape = replace(SMALL, Ns=Ns, dtype=dtype)
    built = found.build(lora.make_inputs(shape, "cpu"))
    with Recorded() as recorded:
        built.both()
    assert recorded.moved == moved(model.launches_of(OP, shape, provider, {}))


def test_dropout_is_what_torch_runs():
    """Of the one provider that asks for torch's fused dropout on a CPU as well."""
    shape = replace(SMALL, p=0.25)
    built = next(one for one in all_providers("cpu") if one.name == "LoRAFusion-style").build(
        lora.make_inputs(shape, "cpu")
    )
    with Recorded() as recorded:
        built.both()
    assert recorded.moved == moved(model.launches_of(OP, shape, "LoRAFusion-style", {}))


@pytest.mark.parametrize("provider", [BARE, DENSE, SCATTER, SHIRA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_launches_are_what_torch_runs(provider, dtype):
    """But for scattering and gathering, of which torch's operations do not say what they touch."""
    pytest.importorskip("peft")
    shape, pattern = sparse_delta.Shape(128, 96, 80, dtype), Pattern("entries", r=4)
    case = sparse_delta.make_case(shape, pattern, "cpu")
    lane = makers("cpu", shira=True)[provider](case)
    lane.step()
    with Recorded(("mm", "_to_copy", "mul", "clone", "masked_fill_")) as recorded:
        lane.step()
    assert sum(recorded.moved.values()) >= 2
    assert recorded.moved <= moved(model.launches_of("sparse_delta", Work(shape, pattern), provider, {}))


# --- Who has a model -----------------------------------------------------------------------------------------


def test_every_provider_has_a_model():
    for device, ceilings in (("cuda", H200), ("cpu", {"torch.bfloat16": 1e12, "bytes": 1e10})):
        for provider in all_providers(device):
            without = provider.name.startswith("torch.compile")
            without |= device == "cpu" and provider.name == f"{PEFT_F32}, accelerated"  # the reference's casts
            found = model.predicted(OP, REFERENCE, provider.name, BOTH, ceilings)
            assert (found is None) == without, provider.name


@pytest.mark.parametrize("pattern", sparse_delta.PATTERNS, ids=str)
def test_every_sparse_provider_has_a_model(pattern):
    work = Work(sparse_delta.Shape(8192, 4096, 4096, torch.bfloat16), pattern)
    for name in sparse_delta.SPEC.providers("cuda"):
        found = [model.predicted("sparse_delta", work, name, mode, H200) for mode in (FORWARD, BACKWARD, BOTH, STEP)]
        by_torch = "cuda" in name and pattern.kind not in ("entries", "n_of_m")
        if "reference" in name or by_torch:
            assert found == [None] * 4
        elif pattern.r or not name.startswith(SHIRA):
            forward, backward, both, step = found
            assert 0 < forward < both <= step
            assert both == pytest.approx(forward + backward)


def test_no_model():
    for op, provider in ((OP, "torch.compile"), (OP, "nobody"), ("ist_step", PEFT), ("sparse_delta", "nobody")):
        case = Work(sparse_delta.Shape(8, 8, 8, torch.bfloat16), Pattern("rows", 10.0)) if "sparse" in op else REFERENCE
        assert model.predicted(op, case, provider, BOTH, H200) is None
    assert model.predicted("host", {"provider": PEFT}, PEFT, FORWARD, {}) is None
    assert model.predicted(OP, DROPPING, "Unsloth", BOTH, H200) is None
    assert model.predicted(OP, replace(REFERENCE, dtype=torch.float64), PEFT, BOTH, H200) is None
    assert model.predicted(OP, REFERENCE, PEFT, BOTH, {}) is None


@pytest.mark.parametrize("pattern", sparse_delta.PATTERNS, ids=str)
def test_layouts_are_those_of_the_benchmark(pattern):
    """Counted without drawing them, for a floor that is the same."""
    work = Work(sparse_delta.Shape(256, 1024, 512, torch.bfloat16), pattern)
    ceilings = {"torch.bfloat16": 1e15, "bytes": 1e10}  # so that bytes rule
    layout = sparse_delta.make_layout(pattern, 512, 1024, "cpu")
    for mode in (FORWARD, BACKWARD, BOTH, STEP):
        expected = 1e6 * sparse_delta.bytes_moved(work.shape, layout, mode) / ceilings["bytes"]
        assert floor_us("sparse_delta", work, mode, ceilings) == pytest.approx(expected, rel=0.02)


# --- The command ---------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    parser = argparse.ArgumentParser()
    model.add_arguments(parser)
    model.main(parser.parse_args(arguments))
    return capsys.readouterr().out


@pytest.mark.parametrize("gpu", PUBLISHED)
def test_it_says_that_nothing_was_measured(capsys, gpu):
    printed = run(capsys, "--gpu", gpu)
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    titles = [line for line in lines if "lora_linear" in line or "sparse_delta" in line]
    assert len(titles) == 8
    assert all(line.startswith(f"PREDICTED for {gpu}, not measured: ") for line in titles)
    assert BARE in printed and "ours, triton:fused" in printed


def test_cases_are_chosen_by_name(capsys):
    printed = run(capsys, "--op", OP, "--case", "M=1 ", "--case", "M=64 ")
    assert printed.count("PREDICTED") == 2
    with pytest.raises(SystemExit, match="expected a case with nothing like it"):
        run(capsys, "--case", "nothing like it")


def test_launches_are_listed(capsys):
    printed = run(capsys, "--op", OP, "--case", "M=8192 4096→4096 R=16 bf16 p=0.1", "--launches", "ours, triton:fused")
    assert max(map(len, printed.splitlines())) <= 100
    assert "PREDICTED" in printed and "shrink" in printed and "dy pass" in printed
    with pytest.raises(SystemExit, match="expected a provider that these cases have a model of"):
        run(capsys, "--op", OP, "--launches", "nobody")


def written(path, op, machine, cases):
    head = {"op": op, "machine": machine, "ceilings": {"torch.float32": 1e11, "torch.bfloat16": 1e11, "bytes": 1e10}}
    entries = [head, *({"case": case, "rows": rows} for case, rows in cases.items())]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_predicted_beside_measured(capsys, tmp_path, device):
    facts = {"M": 512, "K": 576, "N": "576+192", "R": 16, "dtype": "float32", "p": 0.0}
    rows = [
        facts | {"provider": provider, "mode": mode, "p50_us": 1e4}
        for provider in (BARE, "torch.compile", PEFT) for mode in (FORWARD, BACKWARD, BOTH)
    ]  # fmt: skip
    rows.append(facts | {"provider": "wrong", "error": "y: expected something else"})
    machine = {"device": device, "cpu": "a processor", "gpu": "NVIDIA H100 80GB HBM3"}
    path = written(tmp_path / "some.jsonl", "lora_linear_shared_input", machine, {"one": rows, "two": rows})
    printed = run(capsys, "--results", str(path), "--case", "one")
    assert max(map(len, printed.splitlines())) <= 100
    assert "measured beside PREDICTED, both: lora_linear_shared_input: one" in printed
    assert "two" not in printed
    gap = 0.0 if device == "cpu" else 1.5
    bare = 2 * 2 * 512 * 576 * (576 + 192) / 1e11 + 3 * 512 * 576 * 4 / 1e10  # and the sum of two dx
    ratio = 1e4 / (1e6 * bare + 5 * gap)
    line = next(line.split() for line in printed.splitlines() if line.strip().startswith(BARE))
    assert float(line[-1]) == pytest.approx(ratio, rel=0.1 if device == "cuda" else 0.01)  # a GPU has an L2 cache
    assert next(line.split()[-2:] for line in printed.splitlines() if "torch.compile" in line) == ["–", "–"]


def test_predicted_beside_measured_of_a_sparse_step(capsys, tmp_path):
    facts = {"M": 512, "K": 576, "N": 1536, "dtype": "bfloat16", "kind": "columns", "nnz": 6 * 1536}
    rows = [facts | {"provider": name, "mode": STEP, "p50_us": 1e4} for name in (BARE, "ours, reference")]
    path = written(tmp_path / "some.jsonl", "sparse_delta", {"device": "cpu"}, {"one": rows})
    printed = run(capsys, "--results", str(path))
    line = next(line.split() for line in printed.splitlines() if line.strip().startswith(BARE))
    assert float(line[-1]) == pytest.approx(1e4 / (1e6 * 4 * 512 * 576 * 1536 / 1e11), rel=0.01)
    path.write_text('{"op": "host", "machine": {}, "ceilings": {}}\n')
    with pytest.raises(SystemExit, match="expected results of lora_linear"):
        run(capsys, "--results", str(path))
