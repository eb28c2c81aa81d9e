"""Pruned models of transformers are still its models: its `from_pretrained` takes them back, decoders generate."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ekgfx

transformers = pytest.importorskip("transformers", reason="needs transformers")

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**COMMON, "vocab_size": 99, "max_position_embeddings": 40}
TOKENS = torch.randint(5, 99, (2, 12), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
AGAIN = """
import sys, torch, transformers
from safetensors.torch import load_file
given = load_file(sys.argv[2])
model = getattr(transformers, sys.argv[3]).from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(**{name: given[name] for name in given if name != "logits"}).logits
assert torch.equal(logits, given["logits"]), (logits - given["logits"]).abs().max()
"""


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)), {"input_ids": TOKENS}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(**COMMON, image_size=16, patch_size=4)
    return transformers.ViTForImageClassification(config), {"pixel_values": PIXELS}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), {"input_ids": TOKENS}


EXPECTED = {  # of the 4 heads 2 stay, and with them 16 of 32 channels; of the 48 hidden ones half
    bert: {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24},
    vit: {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24},
    llama: {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 24},
}


@pytest.mark.parametrize("make", EXPECTED)
def test_from_pretrained_takes_a_uniform_plan_back(make: Any, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model, inputs = make()
    traced = ekgfx.trace(model.eval(), inputs)
    least = ekgfx.search(traced, flops=0.4, strategy="uniform", importance="magnitude", uniform_layers=True)
    pruned: Any = ekgfx.prune(model, least, traced, graphs="forbid")
    before, after = model.config.to_dict(), pruned.config.to_dict()
    assert {name: after[name] for name in after if after[name] != before.get(name)} == EXPECTED[make]
    pruned.save_pretrained(tmp_path / "small")
    with torch.no_grad():
        save_file({**inputs, "logits": pruned(**inputs).logits}, tmp_path / "given.safetensors")
    arguments = [str(tmp_path / "small"), str(tmp_path / "given.safetensors"), type(model).__name__]
    subprocess.run([sys.executable, "-c", AGAIN, *arguments], check=True, timeout=300)


def test_a_decoder_is_pruned_and_generates_as_it_comes() -> None:
    """The cache that it returns is no output: what is in it shrinks."""
    torch.manual_seed(0)
    model, inputs = llama()
    assert model.config.use_cache
    traced = ekgfx.trace(model.eval(), inputs)
    assert traced.groups.prunable_share == 1
    plan = ekgfx.search(traced, flops=0.6, strategy="uniform", importance="magnitude").plan
    pruned: Any = ekgfx.prune(model, plan, traced, graphs="forbid")
    output = pruned(**inputs)
    assert type(output) is type(model(**inputs)) and output.keys() == model(**inputs).keys()
    plain = pruned(**inputs, use_cache=False).logits
    torch.testing.assert_close(output.logits, plain)
    tokens = pruned.generate(TOKENS[:1], max_new_tokens=3, do_sample=False, use_cache=True)
    assert torch.equal(tokens, pruned.generate(TOKENS[:1], max_new_tokens=3, do_sample=False, use_cache=False))
    assert torch.equal(tokens[:, 12], plain[:1, -1].argmax(-1))


def test_an_encoder_and_a_decoder_are_given_tokens_each(tmp_path: Any) -> None:
    """As `ekgfx prune hf:DIR` builds it."""
    from ekgfx.models.source import parse

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
    config = transformers.T5Config(**sizes, architectures=["T5ForConditionalGeneration"])
    config.save_pretrained(tmp_path)
    built = parse(f"hf:{tmp_path}").build()
    assert type(built.model).__name__ == "T5ForConditionalGeneration"
    traced = ekgfx.trace(built.model.eval(), built.example_inputs, outputs="logits")
    assert traced.groups.prunable_share == 1
