from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sft_lightning.errors import UserError
from sft_lightning.merging.layers import LayerMerger
from sft_lightning.merging.merge import MergeOptions, merge_adapters
from sft_lightning.merging.report import MergeReport
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.quantization import QuantizationConfig, load_quantized
from sft_lightning.models.base.weight_files import ShardWriter, weight_files
from sft_lightning.models.export.write import export_adapter

IDS = torch.arange(20)[None]


def llama(vocab_size: int, **changes: Any) -> LlamaConfig:
    values: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(vocab_size=vocab_size, **{**values, **changes})


def make_base(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, **options)
    return folder


def learn(model: PeftModel, seed: int = 0) -> PeftModel:
    """Move what trains as training would, further."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def make_adapter(
    base: Path, folder: Path, config: PeftConfig | AdapterConfig | None = None, seed: int = 0, vocab_size: int = 0
) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    if vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            old = AutoConfig.from_pretrained(base).vocab_size
            matrix.data[old:] = matrix.data[:old].mean(0)
    config = AdapterConfig(r=2) if config is None else config
    model = add_adapter(model, config) if isinstance(config, AdapterConfig) else get_peft_model(model, config)
    learn(model, seed).save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def adapter(model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    tokenizer.save_pretrained(tmp_path / "adapter")
    return make_adapter(model_dir, tmp_path / "adapter")


def load(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def check(base: Path, adapter: Path, merged: Path, tolerance: float = 1e-4) -> None:
    """The merged folder answers like the base under its adapter, through plain PEFT."""
    adapted = PeftModel.from_pretrained(load(base), adapter).eval()
    torch.testing.assert_close(logits(load(merged)), logits(adapted), atol=tolerance, rtol=0)


# --- every way of adapting ------------------------------------------------------------------------------------------

ON = ["q_proj", "down_proj"]
LLAMA: dict[str, PeftConfig | AdapterConfig] = {
    "lora": AdapterConfig(r=2),
    "dora": AdapterConfig(r=2, use_dora=True),
    "rslora, rank and alpha pattern": AdapterConfig(
        r=2, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 3}
    ),
    "bias all": AdapterConfig(r=2, bias="all"),
    "modules_to_save": AdapterConfig(r=2, modules_to_save=["embed_tokens", "lm_head"]),
    "a whole block saved": AdapterConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]),
    "embedding": AdapterConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "token indices": AdapterConfig(r=2, trainable_token_indices=[3, 4]),
    "some layers": AdapterConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=ON, feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=ON),
    "lokr": LoKrConfig(task_type="CAUSAL_LM", r=2, target_modules=ON),
}


@pytest.mark.parametrize("way", LLAMA)
def test_every_way_is_merged_shard_by_shard_as_peft_merges_it(way: str, model_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(model_dir, tmp_path / "adapter", LLAMA[way])
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(max_shard_size="30KB"))
    assert report.whole is None
    assert report.difference is not None
    assert report.difference.largest < 1e-4 < report.difference.moved
    check(model_dir, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(r=2, target_modules=["c_attn", "c_fc"]),
        AdapterConfig(r=2, target_modules=["c_attn"], use_dora=True),
        AdapterConfig(r=2, bias="all"),
        AdapterConfig(r=2, bias="lora_only"),
        AdapterConfig(r=2, only_adapter=False),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True),
    ],
    ids=["lora", "dora", "bias all", "bias lora_only", "everything", "lora_bias"],
)
def test_conv1d_layers_with_tied_embeddings_are_merged(
    config: PeftConfig | AdapterConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    base = make_base(tmp_path / "base", shape)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = add_adapter(model, config) if isinstance(config, AdapterConfig) else get_peft_model(model, config)
    export_adapter(learn(model), tokenizer, tmp_path / "adapter", {})
    report = merge_adapters([str(tmp_path / "adapter")], str(tmp_path / "merged"))
    assert (report.whole, report.untied) == (None, False)
    check(base, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (AdapterConfig(r=2, init="pissa"), "init_lora_weights 'pissa' changes the base"),
        (AdapterConfig(r=2, init="olora"), "init_lora_weights 'olora' changes the base"),
    ],
)
def test_what_changes_the_base_first_is_merged_on_the_whole_model_and_said(
    config: AdapterConfig, why: str, model_dir: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(model_dir, tmp_path / "adapter", config)
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(max_shard_size="50KB"))
    assert report.whole is not None
    assert why in report.whole
    assert len(weight_files(tmp_path / "merged")) > 1
    check(model_dir, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("shape", "streamed"),
    [
        (GPTNeoXConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2), True),
        (
            MixtralConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=2,
            ),
            False,  # the files hold experts one by one, the model in one tensor
        ),
    ],
    ids=["gpt_neox", "mixtral"],
)
def test_other_families_are_merged(shape: PretrainedConfig, streamed: bool, tmp_path: Path) -> None:
    shape.vocab_size = 64
    base = make_base(tmp_path / "base", shape)
    adapter = make_adapter(base, tmp_path / "adapter")
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"))
    assert (report.whole is None) == streamed
    check(base, adapter, tmp_path / "merged")


def test_several_adapters_are_merged_in_order(model_dir: Path, tmp_path: Path) -> None:
    both = [
        make_adapter(model_dir, tmp_path / "one", AdapterConfig(r=2)),
        make_adapter(model_dir, tmp_path / "two", AdapterConfig(r=2, use_dora=True), seed=1),
    ]
    merge_adapters([str(both[0])], str(tmp_path / "first"))
    merge_adapters([str(adapter) for adapter in both], str(tmp_path / "both"))
    check(tmp_path / "first", both[1], tmp_path / "both")
    merge_adapters([str(adapter) for adapter in reversed(both)], str(tmp_path / "turned"))
    assert (logits(load(tmp_path / "turned")) - logits(load(tmp_path / "both"))).abs().max() > 1e-3


# --- tied embeddings and vocabularies -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "untied"),
    [
        (LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]), False),
        (LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]), True),
        (LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"]), True),
        (LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "embed_tokens"]), True),
        (AdapterConfig(r=2, modules_to_save=["embed_tokens"]), False),  # ours keeps one matrix one
        (AdapterConfig(r=2, trainable_token_indices=[5]), False),
    ],
    ids=["neither", "embedding saved", "head adapted", "embedding adapted", "both saved as one", "tokens"],
)
def test_tied_embeddings_come_apart_only_where_training_took_them_apart(
    config: PeftConfig | AdapterConfig, untied: bool, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", llama(64, tie_word_embeddings=True))
    adapter = make_adapter(base, tmp_path / "adapter", config)
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"))
    assert report.untied == untied
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings == (not untied)
    assert ("lm_head.weight" in load_file(tmp_path / "merged/model.safetensors")) == untied
    check(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(r=2, modules_to_save=["embed_tokens", "lm_head"]),
        AdapterConfig(r=2, modules_to_save=["embed_tokens"]),
        AdapterConfig(r=2, trainable_token_indices=[64, 65]),
    ],
    ids=["both saved", "one saved", "tokens"],
)
def test_a_vocabulary_that_grew_in_training_grows_in_the_merge(
    config: AdapterConfig, tied: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", llama(64, tie_word_embeddings=tied))
    adapter = make_adapter(base, tmp_path / "adapter", config, vocab_size=72)
    if config.trainable_token_indices:  # its tensors do not say how many rows there were
        (adapter / "run_manifest.json").write_text(json.dumps({"vocab_size": 72}))
    merge_adapters([str(adapter)], str(tmp_path / "merged"))
    merged = load(tmp_path / "merged")
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight) == 72
    assert len(merged.get_output_embeddings().weight) == 72
    model = load(base)
    old = model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()
    model.resize_token_embeddings(72, mean_resizing=False)
    for module, rows in zip((model.get_input_embeddings(), model.get_output_embeddings()), old, strict=True):
        module.weight.data[64:] = rows.mean(0)
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=0)


def test_an_adapter_with_fewer_tokens_than_its_base_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", llama(64))
    larger = make_base(tmp_path / "larger", llama(80))
    adapter = make_adapter(base, tmp_path / "adapter", AdapterConfig(r=2, modules_to_save=["embed_tokens"]))
    with pytest.raises(UserError, match="trained with 64 tokens, and what it is merged into has 80"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(model_name_or_path=str(larger)))


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one .bin", "sharded .bin", "sharded safetensors", "bare decoder", "extra tensors"])
def test_every_kind_of_base_file_is_merged(kind: str, model_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    if kind == "one .bin":
        torch.save(weights, base / "pytorch_model.bin")
    elif kind == "sharded .bin":
        names = sorted(weights)
        for number in range(3):
            torch.save({name: weights[name] for name in names[number::3]}, base / f"pytorch_model-{number}.bin")
        index = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(names)}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    elif kind == "extra tensors":
        save_file(
            {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, base / "model.safetensors"
        )
    elif kind == "bare decoder":
        bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    else:
        with ShardWriter(base, 40_000) as writer:
            for name, tensor in weights.items():
                writer.add(name, tensor)
    adapter = make_adapter(model_dir, tmp_path / "adapter")
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(model_name_or_path=str(base)))
    assert report.whole is None
    assert len(report.left_out) == (kind == "extra tensors")
    check(model_dir, adapter, tmp_path / "merged")


def test_the_index_has_every_tensor_and_the_right_size(adapter: Path, tmp_path: Path) -> None:
    merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(max_shard_size="30KB"))
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    files = weight_files(tmp_path / "merged")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 3
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())


def test_a_coarser_type_is_the_float32_merge_rounded_once(adapter: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        merge_adapters([str(adapter)], str(tmp_path / dtype), MergeOptions(dtype=dtype))  # type: ignore[arg-type]
        assert AutoConfig.from_pretrained(tmp_path / dtype).dtype == getattr(torch, dtype)
    fine, *coarse = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16", "float16"))
    for rounded, dtype in zip(coarse, (torch.bfloat16, torch.float16), strict=True):
        assert all(torch.equal(tensor.to(dtype), rounded[name]) for name, tensor in fine.items())


def test_each_weight_keeps_the_type_in_which_the_base_stores_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", llama(64), torch.bfloat16)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    report = merge_adapters([str(make_adapter(base, tmp_path / "adapter"))], str(tmp_path / "merged"))
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert report.dtype == "bfloat16, float32"
    assert {name: tensor.dtype for name, tensor in merged.items()} == {n: t.dtype for n, t in weights.items()}
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], weights["model.layers.0.mlp.up_proj.weight"])


def test_what_float16_cannot_hold_is_refused(model_dir: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"float16 cannot hold the values of model.layers.1.mlp.up_proj.weight"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(dtype="float16"))
    assert not (tmp_path / "merged").exists()


MEASURE = """
import resource, sys
from pathlib import Path
from sft_lightning.merging.layers import LayerMerger
from sft_lightning.merging.merge import MergeOptions, merge_adapters
from sft_lightning.merging.stream import merge_weights
merge_adapters([sys.argv[2]], sys.argv[3] + ".warm", MergeOptions(model_name_or_path=sys.argv[4], verify=False))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_adapters([sys.argv[1]], sys.argv[3], MergeOptions(max_shard_size="32MB", verify=False))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_that_of_a_shard_not_of_the_model(tmp_path: Path) -> None:
    small = make_base(tmp_path / "small", llama(64))
    small_adapter = make_adapter(small, tmp_path / "small_adapter")
    shape = llama(64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12)
    base = make_base(tmp_path / "base", shape, torch.bfloat16, max_shard_size="32MB")
    model_mib = sum(file.stat().st_size for file in weight_files(base)) / 2**20
    adapter = make_adapter(base, tmp_path / "adapter", AdapterConfig(r=2, target_modules=["q_proj"]))
    args = [str(adapter), str(small_adapter), str(tmp_path / "merged"), str(small)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *args], capture_output=True, text=True, check=True)
    grown_mib = int(done.stdout.split()[-1]) / 2**10
    assert len(weight_files(base)) > 10
    assert model_mib > 350
    assert grown_mib < 150  # the shard that is read, the shard that is written, and its bytes on the way to the disk


# --- a base that was quantized in training --------------------------------------------------------------------------


def make_quantized_run(base: Path, tokenizer: PreTrainedTokenizerFast, folder: Path, bits: int) -> Path:
    model = load_quantized(str(base), QuantizationConfig(bits=bits), dtype=torch.float32)
    manifest = {"dtype": "float32", "quantization": {"bits": bits, "quant_type": "nf4", "double_quant": True}}
    export_adapter(learn(add_adapter(model, AdapterConfig(r=2))), tokenizer, folder, manifest)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_both_bases_are_measured_and_the_one_nearer_to_training_is_written(
    bits: int, model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    adapter = make_quantized_run(model_dir, tokenizer, tmp_path / "adapter", bits)
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"))
    assert report.divergences.keys() == {"original", "dequantized"}
    assert report.base == min(report.divergences, key=lambda base: report.divergences[base])
    if bits == 4:
        assert report.base == "dequantized"
        assert report.divergences["dequantized"] < report.divergences["original"] / 100
    assert not (tmp_path / "merged/original").exists()
    assert not (tmp_path / "merged/dequantized").exists()


QUANTIZED_FAMILIES: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=64),
    "falcon": FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=8, time_step_rank=4),
}


@pytest.mark.parametrize("family", ["llama", *QUANTIZED_FAMILIES])
def test_the_dequantized_base_answers_like_the_trained_model(
    family: str, model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = model_dir
    if family != "llama":
        shape = copy.deepcopy(QUANTIZED_FAMILIES[family])
        shape.vocab_size = len(tokenizer)
        base = make_base(tmp_path / "base", shape)
    adapter = make_quantized_run(base, tokenizer, tmp_path / "adapter", 4)
    quantized = load_quantized(str(base), QuantizationConfig(bits=4), dtype=torch.float32)
    trained = logits(PeftModel.from_pretrained(quantized, adapter).eval())
    merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(base="dequantized"))
    torch.testing.assert_close(logits(load(tmp_path / "merged")), trained, atol=1e-4, rtol=0)


def test_the_base_that_the_user_names_is_the_one_that_is_written(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    adapter = make_quantized_run(model_dir, tokenizer, tmp_path / "adapter", 4)
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(base="original"))
    assert report.base == "original"
    check(model_dir, adapter, tmp_path / "merged")


def test_a_base_that_was_not_quantized_is_not_dequantized(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing says that .* is one; say how it was quantized"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(base="dequantized"))


def test_without_measuring_the_user_must_choose_the_base(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    adapter = make_quantized_run(model_dir, tokenizer, tmp_path / "adapter", 4)
    with pytest.raises(UserError, match="cannot be decided by measuring, because --verify is false; set it"):
        merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(verify=False))
    with pytest.raises(UserError, match="several adapters have no one trained model"):
        merge_adapters([str(adapter)] * 2, str(tmp_path / "merged"))


def test_a_base_that_is_stored_quantized_is_refused(adapter: Path, model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "base")
    config = json.loads((model_dir / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds quantized weights"):
        merge_adapters([str(adapter)], str(tmp_path / "m"), MergeOptions(model_name_or_path=str(tmp_path / "base")))


# --- what lies in the folder ----------------------------------------------------------------------------------------

FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
print(prompt, model(torch.tensor([tokenizer(prompt).input_ids])).logits.shape[-1])
"""


def test_a_fresh_process_loads_the_folder_offline(
    adapter: Path, model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    templated = AutoTokenizer.from_pretrained(adapter)
    templated.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    templated.save_pretrained(adapter)
    merge_adapters([str(adapter)], str(tmp_path / "merged"))
    kept, stored = (folder / "generation_config.json" for folder in (tmp_path / "merged", model_dir))
    assert kept.read_text() == stored.read_text()
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "merged")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-2:] == ["<user>Hi", str(len(tokenizer))]


def test_the_model_card_says_what_was_merged_and_measured(adapter: Path, model_dir: Path, tmp_path: Path) -> None:
    (adapter / "run_manifest.json").write_text(json.dumps({"template": "alpaca", "optimizer_steps": 7}))
    (tmp_path / "config.yaml").touch()
    sources = {"train/toy": {"records": 24, "examples": 23, "tokens": 99, "supervised_tokens": 9}}
    (tmp_path / "data_report.json").write_text(json.dumps({"sources": sources}))
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"))
    card = (tmp_path / "merged/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"{model_dir.name}`, merged into its original weights in float32 and rounded once to float32" in card
    assert "LORA, r 2, lora_alpha 32" in card
    assert report.difference is not None
    assert f"at most {report.difference.largest:.1e}" in card
    assert "| template | alpaca |" in card
    assert "| train/toy | 24 | 23 | 99 | 9 |" in card
    assert str(model_dir) not in card


def test_a_longer_context_of_the_run_is_in_the_merged_configuration(adapter: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (adapter / "run_manifest.json").write_text(json.dumps({"rope_parameters": rope}))
    merge_adapters([str(adapter)], str(tmp_path / "merged"))
    assert AutoConfig.from_pretrained(tmp_path / "merged").rope_parameters == rope


def test_a_quantized_base_is_asked_with_the_longer_context_that_it_was_trained_with(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    adapter = make_quantized_run(model_dir, tokenizer, tmp_path / "adapter", 4)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    manifest = json.loads((adapter / "run_manifest.json").read_text())
    (adapter / "run_manifest.json").write_text(json.dumps({**manifest, "rope_parameters": rope}))
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"))
    assert report.divergences["dequantized"] < 1e-9  # else both would be far from a model of other positions


def test_nothing_is_pushed_anywhere(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError

    for name in ("upload_file", "upload_folder", "create_repo", "create_commit"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", refuse)
    assert merge_adapters([str(adapter)], str(tmp_path / "merged")).output_dir.is_dir()


# --- what goes wrong ------------------------------------------------------------------------------------------------


def merge(adapter: Path, folder: Path, **options: Any) -> MergeReport:
    return merge_adapters([str(adapter)], str(folder), MergeOptions(**options))


def test_a_merged_folder_that_answers_otherwise_is_an_error_and_gets_no_name(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerMerger, "merge", lambda self, name, weight: weight)
    with pytest.raises(RuntimeError, match="more than rounding"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / ".merged.new").exists()


def test_a_merge_that_peft_itself_gets_wrong_is_an_error(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linear, "merge", lambda self, **_: None)
    with pytest.raises(RuntimeError, match="merging changes what the model answers"):
        merge(adapter, tmp_path / "merged")


def test_without_verifying_nothing_is_claimed(adapter: Path, tmp_path: Path) -> None:
    report = merge(adapter, tmp_path / "merged", verify=False)
    assert report.difference is None
    assert "Loaded again" not in (tmp_path / "merged/README.md").read_text()


def test_what_is_no_adapter_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"merge --adapter: .* is not an adapter folder"):
        merge(model_dir, tmp_path / "merged")


def test_an_adapter_with_a_tensor_missing_or_left_over_is_refused(adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    name = sorted(weights)[0]
    save_file({key: tensor for key, tensor in weights.items() if key != name}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"missing {name}, left over none"):
        merge(adapter, tmp_path / "merged")
    stranger = {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}
    save_file({**weights, **stranger}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"missing none, left over base_model.model.model.layers.9"):
        merge(adapter, tmp_path / "merged")


def test_an_adapter_of_another_shape_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", llama(320, hidden_size=64))
    with pytest.raises(UserError, match=r"does not fit this base: .* the model wants"):
        merge(adapter, tmp_path / "merged", model_name_or_path=str(other))


def test_a_base_that_is_gone_is_named(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load a model from 'nowhere/at/all'"):
        merge(adapter, tmp_path / "merged", model_name_or_path="nowhere/at/all")


def test_adapters_of_different_bases_are_refused(model_dir: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "other_base")
    other = make_adapter(tmp_path / "other_base", tmp_path / "other")
    with pytest.raises(UserError, match="different bases"):
        merge_adapters([str(adapter), str(other)], str(tmp_path / "merged"))


def test_a_size_that_is_none_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UserError, match="'huge' is no size"):
        MergeOptions(max_shard_size="huge")
