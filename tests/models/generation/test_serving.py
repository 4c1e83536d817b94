from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sft_lightning.data.templates.binding import bind_template
from sft_lightning.errors import UserError
from sft_lightning.models.adapters.trained_base import base_fingerprint
from sft_lightning.models.generation.config import GenerationConfig
from sft_lightning.models.generation.serving import LoadOptions, ServedModel, load_served_model

HELLO = [{"role": "user", "content": "Hello"}]


def serve(path: Path | None, adapter: Path | None = None, **options: object) -> ServedModel:
    load = LoadOptions(**options)  # type: ignore[arg-type]
    return load_served_model("--model", path and str(path), adapter and str(adapter), load)


def with_template(model_dir: Path, folder: Path, template: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    bind_template(template, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_templates_stop_token_ends_an_answer_beside_eos(model_dir: Path, tmp_path: Path) -> None:
    served = serve(with_template(model_dir, tmp_path, "chatml"))
    assert [served.tokenizer.decode([each]) for each in served.stop_token_ids] == ["<|im_end|>", "</s>"]
    assert served.has_template
    assert served.render(HELLO).endswith("<|im_start|>assistant\n")


def test_a_checkpoint_without_a_template_continues_a_text(model_dir: Path) -> None:
    served = serve(model_dir)
    assert not served.has_template
    assert served.tokenizer.decode(served.encode_text("Hello")) == "<s>Hello"
    assert served.context_length == 512


def test_an_eos_that_the_tokenizer_writes_itself_is_removed(
    model_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    served = serve(model_dir)
    ids = served.tokenizer("Hello").input_ids

    class Ends:
        eos_token_id = 2

        def __call__(self, text: str) -> object:
            return type("Encoding", (), {"input_ids": [*ids, 2]})

    served.tokenizer = Ends()  # type: ignore[assignment]
    assert served.encode_text("Hello") == ids


def test_an_answer_has_the_reason_of_its_end(model_dir: Path) -> None:
    served = serve(model_dir)
    prompt = served.encode_text("Hello")
    [[cut]] = served.answer([prompt], GenerationConfig(max_new_tokens=6))
    assert (len(cut.token_ids), cut.stop_reason) == (6, "length")
    served.stop_token_ids = [cut.token_ids[2]]
    [[ended]] = served.answer([prompt], GenerationConfig(max_new_tokens=6))
    assert (ended.token_ids, ended.stop_reason) == (cut.token_ids[: cut.token_ids.index(cut.token_ids[2])], "stop")


def test_an_adapter_is_loaded_with_its_tokenizer_and_the_base_that_it_names(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    bind_template("vicuna_v1.1", tokenizer)
    tokenizer.save_pretrained(tmp_path)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(tmp_path)
    served, base = serve(None, tmp_path), serve(model_dir)
    assert served.has_template
    ids = torch.tensor([[1, 40, 50]])
    with torch.no_grad():
        assert not torch.equal(served.model(input_ids=ids).logits, base.model(input_ids=ids).logits)


def test_an_adapter_with_added_tokens_is_loaded(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(["<new>"])
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    served = serve(model_dir, tmp_path)
    assert len(next(served.model.get_input_embeddings().parameters())) == len(tokenizer)


def export_with_manifest(model_dir: Path, folder: Path, **facts: object) -> Path:
    """An adapter folder as an export writes it, with the base's fingerprint and further facts."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(folder)
    manifest = {"base": str(model_dir), "base_fingerprint": base_fingerprint(str(model_dir)), **facts}
    (folder / "run_manifest.json").write_text(json.dumps(manifest))
    return folder


def test_an_adapter_is_served_with_the_rope_and_the_rows_that_it_was_trained_with(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    plain = serve(None, export_with_manifest(model_dir, tmp_path / "plain"))
    scaled = serve(None, export_with_manifest(model_dir, tmp_path / "scaled", rope_parameters=rope, vocab_size=328))
    ids = torch.tensor([[1, 40, 50, 60, 70]])
    with torch.no_grad():
        difference = scaled.model(input_ids=ids).logits[..., :320] - plain.model(input_ids=ids).logits
    assert difference.abs().max() > 1e-4
    assert len(next(scaled.model.get_input_embeddings().parameters())) == 328
    assert "rope_parameters: {'rope_type': 'linear', 'factor': 4.0" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_refused(model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    other.save_pretrained(tmp_path / "other")
    adapter = export_with_manifest(model_dir, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"--adapter: .* was trained on .*tiny_llama.* has other weights"):
        serve(tmp_path / "other", adapter)


def test_an_adapter_without_a_manifest_is_served_and_said_to_be_unverified(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = export_with_manifest(model_dir, tmp_path)
    (adapter / "run_manifest.json").unlink()
    serve(model_dir, adapter)
    assert f"the base of the adapter in {adapter} cannot be verified" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_is_loaded_quantized(model_dir: Path, bits: int) -> None:
    served = serve(model_dir, quantization=bits)
    kinds = {type(module).__name__ for module in served.model.modules()}
    assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds


def test_a_checkpoint_that_cannot_be_loaded_is_named_with_its_option(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model: required; name a model"):
        serve(None)
    with pytest.raises(UserError, match=r"--model: the folder .* does not exist"):
        serve(tmp_path / "gone")
    with pytest.raises(UserError, match="--model: cannot load"):
        serve(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(UserError, match="names no base model"):
        serve(None, tmp_path)


def test_a_missing_gpu_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device: cuda requires a GPU"):
        serve(model_dir, device="cuda")
