"""The architectures of transformers: a tiny network of each, with random weights, and what becomes of it.

    python benchmarks/coverage.py transformers --output benchmarks/results/coverage-transformers.jsonl
    python benchmarks/coverage.py transformers --output benchmarks/results/coverage-transformers.jsonl --table

For each: trace it as it comes, with the logits named as the output that matters where they are not the only one; cut
half of every group ("half"), and to widths that its configuration can say ("uniform"). Columns:

    as it comes: traced with its inputs alone; exact: the cut module equals the sliced graph in float64 at another
    batch; class: it keeps its class; graphs: modules inside whose forward was replaced; size: it runs on inputs
    of another size, where the original does; API: it takes padded tokens and another implementation of attention where
    the original does, a decoder generates the same with and without its cache, others give a loss; round trip:
    `save_pretrained`, then `from_pretrained`, gives equal outputs; ONNX: exported in float32 by the names of its
    inputs, and equal in ONNX Runtime at two batches.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from common import Lines, Row
from parts.coverage_tables import begun, spread, sweep, sweep_options, works

TOKENS = ("hidden_size", "d_model", "dim", "n_embd", "embedding_size", "emb_dim", "word_embed_proj_dim", "embed_dim")
SMALL: Mapping[str, int] = {
    **dict.fromkeys(TOKENS, 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner", "encoder_ffn_dim"), 48),
    **dict.fromkeys(
        ("decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(("d_kv", "head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("vocab_size",), 99),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok",), 2),
    **{
        "image_size": 32,
        "patch_size": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    },
    **{"num_mel_bins": 16, "max_source_positions": 24, "max_target_positions": 32, "state_size": 4},
}
STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32]}
FOUR = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
SINGLE = {"mixtral", "qwen2_moe", "xglm"}
"""Those that do not run in float64: a product of grouped matrices, the least number of a type as a float."""
TEXT = "SequenceClassification"


def _alike(names: str, **options: Any) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(names.split(), options)


KINDS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    TEXT: {
        **_alike("bert roberta distilbert electra albert deberta deberta-v2 mpnet xlm-roberta ernie convbert roformer"),
        **_alike("fnet megatron-bert rembert layoutlm modernbert data2vec-text esm xlm flaubert ibert camembert"),
        **_alike("squeezebert mobilebert"),
        **_alike("nystromformer", num_landmarks=12, segment_means_seq_len=12),
    },
    "CausalLM": {
        **_alike("gpt2 gpt_neox gptj opt llama mistral qwen2 qwen3 gemma gemma2 phi phi3 falcon bloom stablelm olmo"),
        **_alike("olmo2 cohere starcoder2 mixtral qwen2_moe granite codegen gpt_bigcode biogpt xglm glm helium"),
        **_alike("nemotron smollm3 mamba persimmon ctrl ministral arcee"),
        **_alike("gpt_neo", attention_types=[[["global", "local"], 1]]),
    },
    "ImageClassification": {
        **_alike("vit deit beit dinov2 dinov2_with_registers vit_msn ijepa siglip data2vec-vision"),
        **_alike("mobilenet_v1 mobilenet_v2", depth_multiplier=0.25),
        **_alike("efficientnet", width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320),
        **_alike("convnext convnextv2", **STAGES, num_stages=2),
        **_alike("resnet", **STAGES, embedding_size=16),
        **_alike("bit", **STAGES, embedding_size=16, num_groups=4),
        **_alike("regnet", **STAGES, embedding_size=16, groups_width=8),
        **_alike("swin swinv2", depths=[1, 1], num_heads=[2, 4], embed_dim=16, patch_size=4, window_size=4),
        **_alike("poolformer", **FOUR),
        **_alike("segformer pvt_v2", **FOUR, num_attention_heads=[1, 1, 2, 4]),
        **_alike("focalnet", embed_dim=16, depths=[1, 1], patch_size=4),
        **_alike("mobilevit", hidden_sizes=[32, 32, 32], neck_hidden_sizes=[8, 16, 16, 24, 32, 40, 64], patch_size=2),
    },
    "Seq2SeqLM": _alike("t5 bart mbart pegasus marian blenderbot m2m_100 mt5"),
    "AudioClassification": {
        **_alike(
            "wav2vec2 hubert wavlm unispeech data2vec-audio",
            conv_dim=[16, 16],
            conv_kernel=[10, 3],
            conv_stride=[5, 2],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            classifier_proj_size=16,
        ),
        **_alike("whisper"),
        **_alike("audio-spectrogram-transformer", max_length=32, frequency_stride=8, time_stride=8),
    },
}


def listed() -> list[str]:
    """All of them, as KIND:ARCHITECTURE, kinds in turn."""
    return spread([f"{kind}:{name}" for name in names] for kind, names in KINDS.items())


def small(config: Any) -> dict[str, Any]:
    """The small values of what a configuration has, and those of the configurations in it."""
    known = config.to_dict().keys() | {key for key in SMALL if hasattr(config, key)}
    inner = {key: small(value) for key, value in vars(config).items() if hasattr(value, "to_dict")}
    derived = {key for key, value in vars(type(config)).items() if isinstance(value, property)}
    one = {key for key in known if not isinstance(getattr(config, key, None), list | tuple)}  # not one for each stage
    return {key: value for key, value in SMALL.items() if key in known & one - derived} | inner


def build(name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The model, its inputs, and inputs of another batch and size."""
    import torch
    import transformers

    kind, _, architecture = name.partition(":")
    asked = {**small(transformers.AutoConfig.for_model(architecture)), **KINDS[kind][architecture]}
    config = transformers.AutoConfig.for_model(architecture, **asked)
    config.architectures = config.architectures or []  # the first of several classes, where it names none
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()
    dtype = torch.float32 if architecture in SINGLE else torch.float64
    model = model.to(dtype)
    if kind == "Seq2SeqLM" and model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = 0  # T5 has none in its configuration
    config = getattr(config, "vision_config", config)
    draw = torch.Generator().manual_seed(0)

    def inputs(batch: int, length: int) -> dict[str, Any]:
        if kind == "ImageClassification":
            side = 32 if length == 12 else 48
            return {"pixel_values": torch.randn(batch, 3, side, side, generator=draw, dtype=dtype)}
        if kind == "AudioClassification":
            shapes = {"whisper": (batch, 16, 48), "audio-spectrogram-transformer": (batch, 32, 16)}
            shape = shapes.get(architecture, (batch, 40 * length))
            key = {"whisper": "input_features"}.get(architecture, "input_values")
            return {key: torch.randn(shape, generator=draw, dtype=dtype)}
        tokens = torch.randint(3, 90, (batch, length), generator=draw)
        return {"input_ids": tokens} | ({"decoder_input_ids": tokens[:, :5]} if kind == "Seq2SeqLM" else {})

    return model, inputs(2, 12), {"batch": inputs(3, 12), "size": inputs(2, 10)}


def also(name: str) -> list[dict[str, Any]]:
    """Calls that run what the inputs alone do not: the message of a trace asks for one where it leaves out much."""
    import torch

    return [{"bool_masked_pos": torch.ones(2, 16, dtype=torch.bool)}] if ":dinov2" in name else []


def perturb(model: Any) -> None:
    """Draws its weights; what it does not save, but computes anew, stays what is computed."""
    from ekgfx.surgery.check import perturb as draw

    computed = {key: model.state_dict()[key].clone() for key in getattr(model, "_keys_to_ignore_on_save", None) or ()}
    draw(model)
    model.load_state_dict(computed, strict=False)


def asked_for(name: str, model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the message of a trace asks for: the logits by name where they are not the only output, further calls."""
    import torch

    with torch.no_grad():
        output = model(**inputs)
    several = [key for key, value in output.items() if isinstance(value, torch.Tensor)] != ["logits"]
    return {"outputs": "logits" if several else None, "also": also(name)}


def measure(name: str) -> dict[str, Any]:
    """The row of one architecture."""
    import ekgfx
    from ekgfx.surgery.check import check_pruned

    start = begun()
    model, inputs, others = build(name)
    perturb(model)
    row: dict[str, Any] = {"model": name, "params": sum(p.numel() for p in model.parameters())}
    asked = asked_for(name, model, inputs)
    traced = ekgfx.trace(model, inputs, **asked)
    row |= {"named": bool(asked["outputs"]), "also": sorted(key for call in asked["also"] for key in call)}
    row |= {"groups": len(traced.groups), "share": round(traced.groups.prunable_share, 3)}
    row["unknown"] = traced.unknown_ops
    plan = ekgfx.Plan({n: tuple(range(0, g.size, 2)) for n, g in traced.groups.items()})
    row["half"] = cut(model, traced, plan, inputs, others, name, check_pruned)
    try:
        found = ekgfx.search(traced, flops=0.8, strategy="uniform", importance="magnitude", uniform_layers=True)
    except ekgfx.EkgfxError as error:
        row["uniform"] = {"error": str(error)[:300]}
    else:
        row["uniform"] = cut(model, traced, found.plan, inputs, others, name, check_pruned)
        row["uniform"]["kept"] = round(found.kept_fraction, 3)
    row["seconds"] = round(time.process_time() - start, 1)
    half = row["half"]
    exact = 1e-4 if name.partition(":")[2] in SINGLE else 1e-6
    row["status"] = "failed" if "error" in half else "ok" if half["error_at_batch"] < exact else "inexact"
    return row


def cut(model: Any, traced: Any, plan: Any, inputs: Any, others: Any, name: str, check_pruned: Any) -> dict[str, Any]:
    """What becomes of one plan."""
    import torch

    import ekgfx
    from ekgfx.surgery.check import relative_error

    found: dict[str, Any] = {}
    try:
        pruned = ekgfx.prune(model, plan, traced)
        found["cache"] = bool(getattr(pruned.config, "use_cache", False))
        if bool(getattr(model.config, "use_cache", False)) == found["cache"]:
            found["error_at_batch"] = float(check_pruned(traced, plan, pruned, (), others["batch"]))
        else:  # it runs without its cache, and says so
            with torch.no_grad():
                sliced = traced.subnetwork(plan)(**others["batch"]).logits
                found["error_at_batch"] = relative_error(pruned(**others["batch"]).logits, sliced)
    except ekgfx.EkgfxError as error:
        return {"error": str(error)[:300]}
    found["class"] = type(pruned) is type(model)
    found["graphs"] = sorted({each.kind for each in ekgfx.replaced(pruned)})
    asked = works(lambda: model(**others["size"]))
    found["size"] = asked or works(lambda: pruned(**others["size"]))
    found["size_of_the_original"] = asked
    found["api"] = works(lambda: used(pruned, inputs, name, model))

    def round_trip() -> None:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            pruned.save_pretrained(folder)
            again = type(model).from_pretrained(folder, dtype=model.dtype).eval()
            near = 1e-6 if model.dtype == torch.float64 else 1e-5  # some numbers are float32 at first
            torch.testing.assert_close(again(**inputs).logits, pruned.eval()(**inputs).logits, rtol=near, atol=near)

    found["round_trip"] = works(round_trip)
    found["onnx"] = works(lambda: exported(pruned, inputs))
    return found


def exported(pruned: Any, inputs: Mapping[str, Any]) -> None:
    """To ONNX in float32, by the names of its inputs, and compared there at two batches."""
    import copy

    from ekgfx.export import check_parity, to_onnx

    single = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    with tempfile.TemporaryDirectory() as folder:
        network, path = copy.deepcopy(pruned).float(), f"{folder}/model.onnx"
        to_onnx(network, single, path)
        check_parity(network, path, single)


def masked(network: Any, inputs: Any) -> Any:
    """Its output where the second sample begins with padding."""
    import torch

    mask = torch.ones(inputs["input_ids"].shape, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        return network(**inputs, attention_mask=mask).logits


def used(pruned: Any, inputs: Any, name: str, model: Any) -> None:
    """What people do with such a model, where the unpruned one takes it as well."""
    import torch

    if "input_ids" in inputs and not works(lambda: masked(model, inputs)):
        assert torch.isfinite(masked(pruned, inputs)[0]).all()
    before = getattr(pruned.config, "_attn_implementation", None)
    if before == "sdpa" and not works(lambda: (model.set_attn_implementation("eager"), model(**inputs))):
        near = 1e-6 if model.dtype == torch.float64 else 1e-4  # some compute their softmax in float32
        with torch.no_grad():
            expected = pruned(**inputs).logits
            pruned.set_attn_implementation("eager")
            torch.testing.assert_close(pruned(**inputs).logits, expected, rtol=near, atol=near)
    for network in (model, pruned) if before == "sdpa" else ():
        network.set_attn_implementation(before)
    if name.startswith(("CausalLM", "Seq2Seq")):
        ids = inputs["input_ids"][:1]
        options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        options["suppress_tokens"] = [0]  # padding, which counts as no position
        pruned.generation_config.forced_eos_token_id = None  # Marian's is that
        assert torch.equal(pruned.generate(ids, **options), pruned.generate(ids, **options, use_cache=False))
    else:
        batch = len(next(iter(inputs.values())))
        assert torch.isfinite(pruned(**inputs, labels=torch.zeros(batch, dtype=torch.long)).loss)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, with what they say together."""
    cut = [row for row in rows if "half" in row and "error" not in row["half"]]
    uniform = [row for row in cut if "round_trip" in row["uniform"]]

    def how_many(some: list[dict[str, Any]], says: Any) -> str:
        return f"{sum(bool(says(row)) for row in some)} of {len(some)}"

    def without_cache(row: dict[str, Any]) -> bool:
        return row["model"].startswith(("CausalLM", "Seq2SeqLM")) and row["half"].get("cache") is False

    tried = [row for row in cut if "onnx" in row["half"]]
    lines = [
        f"- {how_many(rows, lambda r: r['status'] != 'error')} architectures are traced as they come, "
        f'{how_many(rows, lambda r: r.get("named"))} with `outputs="logits"` and '
        f"{how_many(rows, lambda r: r.get('also'))} with a call besides, as the message of a trace asks for; "
        f"{how_many(rows, lambda r: r['status'] == 'ok')} are cut exactly (to 1e-6 at another batch).",
        f"- With half of every group, {how_many(cut, lambda r: r['half']['class'])} keep their class, "
        f"{how_many(cut, lambda r: not r['half']['graphs'])} without another forward inside; "
        f"{how_many(cut, lambda r: not r['half']['api'])} work with the library's API, "
        f"{how_many(cut, without_cache)} are decoders that run without their cache, as a warning says; "
        f"{how_many(tried, lambda r: not r['half']['onnx'])} export to ONNX.",
        f"- With `uniform_layers`, {how_many(uniform, lambda r: not r['uniform']['round_trip'])} come back equal from "
        f"`save_pretrained` and `from_pretrained`, {how_many(uniform, lambda r: not r['uniform']['graphs'])} without "
        f"another forward; {len(cut) - len(uniform)} find no such plan of 80% of the MACs.",
        "",
        "| architecture | status | groups | prunable | graphs inside | API | size | ONNX | round trip | kept | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: r["model"]):
        cells = [row["model"].replace(":", ": ")]
        if "half" not in row or "error" in row["half"]:
            why = row.get("message") or row["half"]["error"]
            cells += [f"{row['status']}: {why[:90].replace('|', '/')}", *[""] * 9]
        else:
            half, uniform_cut = row["half"], row["uniform"]
            cells += [row["status"], row["groups"], f"{row['share']:.0%}", ", ".join(half["graphs"]) or "none"]
            size = "fixed" if half["size_of_the_original"] else "no" if half["size"] else "yes"
            onnx = half.get("onnx")
            cells += ["no" if half["api"] else "yes", size, "" if onnx is None else "no" if onnx else "yes"]
            trip = uniform_cut.get("round_trip")
            cells += ["no plan" if trip is None else "no" if trip else "equal"]
            cells += [f"{uniform_cut['kept']:.0%}" if "kept" in uniform_cut else "", row["seconds"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(asked: argparse.Namespace) -> None:
    found = Lines(asked.output)
    if asked.table:
        print(table(list(found)))
    else:
        import transformers  # noqa: F401  the processes that are forked have it

        sweep(measure, asked.models or listed(), found)


def options(parser: argparse.ArgumentParser) -> None:
    sweep_options(parser, "KIND:ARCHITECTURE (default: all of them)")
