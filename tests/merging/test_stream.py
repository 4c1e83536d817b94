"""Covers sft_lightning.merging.stream and sft_lightning.merging.layers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from sft_lightning.errors import UserError
from sft_lightning.merging.merge import MergeOptions, merge_adapters
from sft_lightning.models.adapters.config import AdapterConfig
from sft_lightning.models.adapters.wrapping import add_adapter
from sft_lightning.models.base.weight_files import ShardWriter, weight_files
from sft_lightning.models.export.write import export_adapter

Make = Callable[..., Any]
"""A helper of conftest.py."""

ON = ["q_proj", "down_proj"]
LLAMA: dict[str, PeftConfig | AdapterConfig] = {
    "lora": AdapterConfig(r=2),
    "dora": AdapterConfig(r=2, use_dora=True),
    "rslora, rank and alpha pattern": AdapterConfig(
        r=2, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 3}
    ),
    "bias all": AdapterConfig(r=2, bias="all"),
    "modules_to_save": AdapterConfig(r=2, modules_to_save=["embed_tokens", "lm_head"]),
    "a decoder block in modules_to_save": AdapterConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]),
    "embedding": AdapterConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "token indices": AdapterConfig(r=2, trainable_token_indices=[3, 4]),
    "some layers": AdapterConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=ON, feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=ON),
    "lokr": LoKrConfig(task_type="CAUSAL_LM", r=2, target_modules=ON),
}


@pytest.mark.parametrize("kind", LLAMA)
def test_every_kind_of_adapter_is_merged_shard_by_shard_as_peft_merges_it(
    kind: str, model_dir: Path, tmp_path: Path, make_adapter: Make, assert_merged: Make
) -> None:
    adapter = make_adapter(model_dir, tmp_path / "adapter", LLAMA[kind])
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"), MergeOptions(max_shard_size="30KB"))
    assert report.whole_model_reason is None
    assert report.difference is not None
    assert report.difference.largest < 1e-4 < report.difference.moved
    assert_merged(model_dir, adapter, tmp_path / "merged")


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
    config: PeftConfig | AdapterConfig,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    make_base: Make,
    train_a_little: Make,
    assert_merged: Make,
) -> None:
    shape = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
    base = make_base(tmp_path / "base", shape)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = add_adapter(model, config) if isinstance(config, AdapterConfig) else get_peft_model(model, config)
    export_adapter(train_a_little(model), tokenizer, tmp_path / "adapter", {}, stop_token_id=2)
    report = merge_adapters([str(tmp_path / "adapter")], str(tmp_path / "merged"))
    assert (report.whole_model_reason, report.untied) == (None, False)
    assert_merged(base, tmp_path / "adapter", tmp_path / "merged")


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
def test_other_families_are_merged(
    shape: PretrainedConfig,
    streamed: bool,
    tmp_path: Path,
    make_base: Make,
    make_adapter: Make,
    assert_merged: Make,
) -> None:
    shape.vocab_size = 64
    base = make_base(tmp_path / "base", shape)
    adapter = make_adapter(base, tmp_path / "adapter")
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"))
    assert (report.whole_model_reason is None) == streamed
    assert_merged(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("config", "untied"),
    [
        (LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]), False),
        (LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]), True),
        (LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"]), True),
        (LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "embed_tokens"]), True),
        (AdapterConfig(r=2, modules_to_save=["embed_tokens"]), False),  # AdapterConfig sets ensure_weight_tying
        (AdapterConfig(r=2, trainable_token_indices=[5]), False),
    ],
    ids=["neither", "embedding saved", "head adapted", "embedding adapted", "both saved as one", "tokens"],
)
def test_tied_embeddings_are_untied_only_if_training_changed_one_of_them(
    config: PeftConfig | AdapterConfig,
    untied: bool,
    tmp_path: Path,
    llama_config: Make,
    make_base: Make,
    make_adapter: Make,
    assert_merged: Make,
) -> None:
    base = make_base(tmp_path / "base", llama_config(64, tie_word_embeddings=True))
    adapter = make_adapter(base, tmp_path / "adapter", config)
    report = merge_adapters([str(adapter)], str(tmp_path / "merged"))
    assert report.untied == untied
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings == (not untied)
    assert ("lm_head.weight" in load_file(tmp_path / "merged/model.safetensors")) == untied
    assert_merged(base, adapter, tmp_path / "merged")


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
    config: AdapterConfig,
    tied: bool,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    llama_config: Make,
    make_base: Make,
    make_adapter: Make,
    load_model: Make,
    logits: Make,
) -> None:
    base = make_base(tmp_path / "base", llama_config(64, tie_word_embeddings=tied))
    adapter = make_adapter(base, tmp_path / "adapter", config, vocab_size=72)
    if config.trainable_token_indices:  # its tensors do not say how many rows there were
        (adapter / "run_manifest.json").write_text(json.dumps({"vocab_size": 72}))
    merge_adapters([str(adapter)], str(tmp_path / "merged"))
    merged = load_model(tmp_path / "merged")
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight) == 72
    assert len(merged.get_output_embeddings().weight) == 72
    model = load_model(base)
    old = model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()
    model.resize_token_embeddings(72, mean_resizing=False)
    for module, rows in zip((model.get_input_embeddings(), model.get_output_embeddings()), old, strict=True):
        module.weight.data[64:] = rows.mean(0)
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["one .bin", "sharded .bin", "sharded safetensors", "bare decoder", "extra tensors"])
def test_every_kind_of_base_file_is_merged(
    kind: str, model_dir: Path, tmp_path: Path, make_adapter: Make, assert_merged: Make
) -> None:
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
    assert report.whole_model_reason is None
    assert len(report.left_out) == (kind == "extra tensors")
    assert_merged(model_dir, adapter, tmp_path / "merged")


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


def test_each_weight_keeps_the_type_in_which_the_base_stores_it(
    tmp_path: Path,
    llama_config: Make,
    make_base: Make,
    make_adapter: Make,
) -> None:
    base = make_base(tmp_path / "base", llama_config(64), torch.bfloat16)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    report = merge_adapters([str(make_adapter(base, tmp_path / "adapter"))], str(tmp_path / "merged"))
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert report.dtype == "bfloat16, float32"
    assert {name: tensor.dtype for name, tensor in merged.items()} == {n: t.dtype for n, t in weights.items()}
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], weights["model.layers.0.mlp.up_proj.weight"])


def test_a_value_that_float16_cannot_represent_is_refused(model_dir: Path, tmp_path: Path, make_adapter: Make) -> None:
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"float16 cannot represent the values of model.layers.1.mlp.up_proj.weight"):
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


@pytest.mark.slow
def test_merging_needs_the_memory_of_a_shard_not_of_the_model(
    tmp_path: Path,
    llama_config: Make,
    make_base: Make,
    make_adapter: Make,
) -> None:
    small = make_base(tmp_path / "small", llama_config(64))
    small_adapter = make_adapter(small, tmp_path / "small_adapter")
    shape = llama_config(64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12)
    base = make_base(tmp_path / "base", shape, torch.bfloat16, max_shard_size="32MB")
    model_mib = sum(file.stat().st_size for file in weight_files(base)) / 2**20
    adapter = make_adapter(base, tmp_path / "adapter", AdapterConfig(r=2, target_modules=["q_proj"]))
    args = [str(adapter), str(small_adapter), str(tmp_path / "merged"), str(small)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *args], capture_output=True, text=True, check=True)
    grown_mib = int(done.stdout.split()[-1]) / 2**10
    assert len(weight_files(base)) > 10
    assert model_mib > 350
    assert grown_mib < 150  # the shard that is read, the shard that is written, and its bytes on the way to the disk
