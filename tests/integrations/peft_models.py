"""Tiny random PEFT models and the three runs that the tests compare: the float64 reference, PEFT's own, accelerated."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_kernels.integrations.peft import Report
from peft_kernels.ops.core import dropout
from peft_kernels.testing import ulp

VOCABULARY = 32
_SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
_BERT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, num_key_value_heads=1))


def _bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES, **_BERT))


def _bert_decoder():
    config = transformers.BertConfig(**_SIZES, **_BERT, is_decoder=True, add_cross_attention=True)
    return transformers.BertLMHeadModel(config)


def _gpt2():
    sizes = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )


def _t5():
    sizes = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0)
    )


KINDS = {"llama": _llama, "bert": _bert, "bert_decoder": _bert_decoder, "gpt2": _gpt2, "t5": _t5}


def make(kind: str = "llama", dtype: torch.dtype = torch.float32, adapters: torch.dtype | None = None, **lora):
    """A PEFT model of two blocks with LoRA in every linear layer and B ≠ 0, in train mode."""
    torch.manual_seed(0)
    settings = dict(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    settings |= dict(fan_in_fan_out=kind == "gpt2")
    base = KINDS[kind]().to(dtype)
    base.loss_type = base.loss_type or "ForCausalLM"  # or else a warning, which torch.compile cannot trace
    model = get_peft_model(base, LoraConfig(**(settings | lora)), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
            parameter.data = parameter.data.to(adapters or dtype)
    return model.train()


def batch_for(model, tokens: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (2, tokens), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    if getattr(model.config, "add_cross_attention", False):
        hidden = torch.randn(2, 5, model.config.hidden_size, generator=generator, dtype=torch.float64)
        batch["encoder_hidden_states"] = hidden
    return batch


def run(model, batch=None, autocast: torch.dtype | None = None, seed: int = 3, backward: bool = True):
    """logits, loss and every adapter gradient by name."""
    batch = batch or batch_for(model)
    dtype = next(model.parameters()).dtype
    batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        output = model(**batch, use_cache=False)
    results = {"logits": output.logits.detach(), "loss": output.loss.detach()}
    if backward:
        output.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert grads and all(grad is not None for grad in grads.values())
        results |= grads
    return results


def run_layer(layer, x, grad, autocast: torch.dtype | None = None):
    """y and the gradients of x and of every parameter that trains, by name; of a copy of the layer."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        y = layer(x)
    leaves = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, grads))}


def assert_as_close_as_peft(ours: list[dict], eager: list[dict], float64_reference: list[dict]) -> None:
    """Logits and gradients: the norm of the error against PEFT's own, geometric mean over several runs, at
    most twice for each tensor and 1.25 times for half of them. One run would prove little: all its gradients
    carry the rounding errors of one loss, and the ratio of two such errors is a matter of luck. (One layer is
    held to the strict rule.) The loss, a single number: the rms of its errors within twice PEFT's and one ulp."""
    ratios = {}
    for name in float64_reference[0]:
        errors, yardsticks = [], []
        for one, other, true in zip(ours, eager, float64_reference):
            assert one[name].dtype == other[name].dtype and one[name].shape == true[name].shape
            once_rounded = torch.finfo(one[name].dtype).eps / 4 * true[name].norm().item()
            errors.append(max((one[name].double() - true[name]).norm().item(), once_rounded))
            yardsticks.append(max((other[name].double() - true[name]).norm().item(), once_rounded))
        if name == "loss":
            rms, allowed = (math.sqrt(statistics.fmean(e * e for e in values)) for values in (errors, yardsticks))
            bound = 2.0 * allowed + ulp(true["loss"].item(), one["loss"].dtype)
            assert rms <= bound, f"loss: rms error {rms:.3e} > {bound:.3e}"
        else:
            ratios[name] = statistics.geometric_mean(errors) / statistics.geometric_mean(yardsticks)
    worst = max(ratios, key=ratios.get)
    assert ratios[worst] <= 2.0, f"{worst}: {ratios[worst]:.2f} times the error of PEFT"
    middle = statistics.median(ratios.values())
    assert middle <= 1.25, f"half of the tensors have more than {middle:.2f} times the error of PEFT"


def assert_equal(results, expected) -> None:
    assert results.keys() == expected.keys()
    for name in results:
        size = 1.0 if expected[name] is None else expected[name].abs().max().item()
        bounds = dict(rtol=1e-5, atol=1e-6 * max(size, 1.0))
        torch.testing.assert_close(
            results[name], expected[name], **bounds, msg=lambda text, name=name: f"{name}: {text}"
        )


def snapshot(model):
    """All that `restore` has to bring back: classes and attributes, by identity where they are tensors."""

    def of(value):
        return dict(value) if isinstance(value, dict) else value

    return [(type(m), {key: of(value) for key, value in m.__dict__.items()}) for m in model.modules()]


def replay_dropout(model, report: Report):
    """A copy of PEFT's model (not accelerated) whose dropouts use the masks that the accelerated one draws:
    one seed an op call from torch's generator, one stream a member of a group."""
    model = copy.deepcopy(model)
    seeds: dict[int, torch.Tensor] = {}
    groups = [
        *report.shared,
        *((name,) for name in report.fused if not any(name in g for g in report.shared)),
    ]
    for number, names in enumerate(groups):
        for stream, name in enumerate(names):
            layer = model.get_submodule(name)
            for adapter, module in layer.lora_dropout.items():
                if isinstance(module, nn.Dropout):
                    layer.lora_dropout[adapter] = _ReplayedDropout(module.p, seeds, number, stream, len(names))
    return model


class _ReplayedDropout(nn.Module):
    def __init__(self, p, seeds, group, stream, streams):
        super().__init__()
        self.p, self.seeds, self.group, self.stream, self.streams = p, seeds, group, stream, streams

    def forward(self, x):
        if not self.training:
            return x
        if self.stream == 0:
            self.seeds[self.group] = dropout.draw_seed(x.device)
        columns = x.shape[-1]
        packed = dropout.draw_mask(self.seeds[self.group], x.numel() // columns, columns, self.p, self.streams)
        kept = dropout.unpack_mask(packed[self.stream], columns).view(x.shape)
        return x * kept.to(x.dtype) * dropout.rescale(self.p)
