"""A base without a chat template, a fine-tuned model with one, an adapter, and a comparison made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft_lightning.comparison.perplexity import ReferenceLoss
from sft_lightning.comparison.prompts import ComparisonPrompt
from sft_lightning.comparison.results import ComparedModel, Comparison, ModelResult, Role, make_response
from sft_lightning.data.templates.binding import bind_template
from sft_lightning.models.generation.config import GenerationConfig
from sft_lightning.models.generation.serving import Answer


@pytest.fixture(scope="session")
def tuned_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(model_dir)
    config.initializer_range = 0.3
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    bind_template("vicuna_v1.1", tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_dir(model_dir: Path, tuned_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(2)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tuned_dir).save_pretrained(folder)
    return folder


EVIL = "<script>alert(1)</script> & \x1b[31m ```` | [bold]"


def result(role: Role, *texts: str) -> ModelResult:
    answers = [[make_response(Answer(text, [1, 2, 3], "stop"), "cold")] for text in texts]
    model = ComparedModel(role, f"the {role}", f"runs/{role}")
    return ModelResult(model, role != "baseline", {"greedy": answers}, [ReferenceLoss(2.0, 2)] * len(texts))


@pytest.fixture
def comparison() -> Comparison:
    """Two models that answer two prompts; one answer tries to break out of every report."""
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hot's opposite?"}]
    prompts = [ComparisonPrompt(turns, "", "p.jsonl, line 1", "cold"), ComparisonPrompt(turns, "", "l 2", "cold")]
    models = [result("baseline", "warm", "same"), result("finetuned", EVIL, "same")]
    return Comparison(prompts, {"greedy": GenerationConfig(max_new_tokens=9)}, models)
