"""A real model: SmolLM2-135M with LoRA of rank 16 in all linear layers, accelerated against PEFT's own."""

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import peft_kernels as pk
from tests.integrations.peft_models import assert_as_close_as_peft, replay_dropout

pytestmark = pytest.mark.slow

TOKENS, RUNS = 16, 4


@pytest.fixture(scope="module", autouse=True)
def all_threads(one_thread):
    threads = torch.get_num_threads()
    torch.set_num_threads(torch.get_num_interop_threads())
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert model.config.num_hidden_layers == 30 and model.config.hidden_size == 576
    return model


def with_lora(base, p):
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=p, target_modules="all-linear", init_lora_weights="gaussian")
    model = get_peft_model(copy.deepcopy(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)  # at zero, the gradient of A proves nothing
    return model.train()


def run(model, seed, autocast=None):
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        output = model(input_ids=ids, labels=ids, use_cache=False)
    names, leaves = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    grads = torch.autograd.grad(output.loss, leaves)
    logits = output.logits.detach()
    losses = cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")  # a few means would prove little
    return {"logits": logits, "loss of each token": losses, **dict(zip(names, grads))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_within_twice_the_error_of_peft(base, p, dtype):
    """Logits, loss and every gradient of an adapter, in float32 and as PEFT trains in bfloat16: bfloat16
    base, float32 adapters, autocast."""
    eager = with_lora(base, p)
    for name, parameter in eager.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    ours = copy.deepcopy(eager)
    report = pk.integrations.peft.accelerate(ours)
    assert len(report.fused) == 210 and len(report.shared) == 60 and not report.kept
    assert len(str(report).splitlines()) < 8
    if p:
        eager = replay_dropout(eager, report)
    wide = copy.deepcopy(eager).double()
    autocast = None if dtype == torch.float32 else dtype
    assert_as_close_as_peft(
        [run(ours, seed, autocast) for seed in range(RUNS)],
        [run(eager, seed, autocast) for seed in range(RUNS)],
        [run(wide, seed) for seed in range(RUNS)],
    )
