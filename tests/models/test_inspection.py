from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MambaConfig, PreTrainedModel

from sft_lightning.models.inspection import (
    base_model,
    bypassed_modules,
    computing_device,
    evaluating,
    has_virtual_tokens,
    is_sharded,
    max_positions,
)


def tiny_llama() -> PreTrainedModel:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=8, **sizes, **heads))
    return model


def test_the_base_of_an_adapted_model_is_the_transformers_model_inside() -> None:
    model = tiny_llama()
    assert base_model(model) is model
    assert base_model(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) is model  # type: ignore[arg-type]


def test_a_model_that_is_not_from_transformers_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a transformers model inside, found a Linear"):
        base_model(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_the_context_is_unlimited_where_the_configuration_sets_no_limit() -> None:
    assert max_positions(LlamaConfig(max_position_embeddings=77)) == 77
    assert max_positions(MambaConfig()) == 2**30


def test_only_mamba_reads_weights_past_its_layers() -> None:
    assert bypassed_modules(MambaConfig()) == {"x_proj", "dt_proj", "out_proj", "conv1d"}
    assert bypassed_modules(AutoConfig.for_model("mamba2")) == {"out_proj", "conv1d"}
    assert not bypassed_modules(LlamaConfig())


def test_only_prompt_learning_methods_have_virtual_tokens() -> None:
    assert not has_virtual_tokens(tiny_llama())
    assert not has_virtual_tokens(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))  # type: ignore[arg-type]
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert has_virtual_tokens(get_peft_model(tiny_llama(), prefix))  # type: ignore[arg-type]


@pytest.mark.parametrize("mark", ["device_mesh", "ds_id"])
def test_a_model_with_one_sharded_parameter_is_sharded(mark: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert not is_sharded(model)
    setattr(model[1].weight, mark, None)
    assert is_sharded(model)


def test_an_offloaded_model_computes_where_its_mesh_is() -> None:
    model = torch.nn.Linear(2, 2)
    assert computing_device(model) == torch.device("cpu")
    model.weight.device_mesh = SimpleNamespace(device_type="cuda")  # type: ignore[assignment]
    assert computing_device(model) == torch.device("cuda")


@pytest.mark.parametrize("mode", [True, False])
def test_every_module_gets_its_own_mode_back_after_evaluation(mode: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model.train(mode)
    model[1][0].train(not mode)

    def evaluate() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    assert [module.training for module in model.modules()] == [mode, mode, mode, not mode]


def test_a_module_that_reacts_to_training_mode_is_told_of_it_after_evaluation() -> None:
    class Caching(torch.nn.Linear):
        cached = True

        def train(self, mode: bool = True) -> Caching:
            self.cached = self.cached and not mode
            return super().train(mode)  # type: ignore[return-value]

    model = Caching(2, 2)
    with evaluating(model):
        assert model.cached
    assert not model.cached
