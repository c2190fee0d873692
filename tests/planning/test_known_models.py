"""The table of public models: totals of parameters that are published elsewhere, and how names are looked up."""

from __future__ import annotations

import pytest

from tunesmith.planning.known_models import MODELS, published_config
from tunesmith.planning.read_facts import read_facts

PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "mistralai/Mistral-Nemo-Instruct-2407": 12_247_782_400,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-3-1b-pt": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472,
    "google/gemma-3-27b-it": 27_432_406_640,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
}
"""Totals that the hub, keras-hub and llama.cpp give for the files themselves."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_models_sizes_add_up_to_its_parameters(name):
    assert read_facts(MODELS[name], name).parameters == PUBLISHED[name]


@pytest.mark.parametrize(("name", "published"), [("20b", 20_914_757_184), ("120b", 116_829_156_672)])
def test_an_experts_biases_are_not_in_a_config(name, published):
    """Sinks and biases of experts are left out: 3 parameters of 10,000."""
    counted = read_facts(MODELS[f"openai/gpt-oss-{name}"], name).parameters

    assert 0.9995 * published < counted < published


@pytest.mark.parametrize("name", MODELS)
def test_every_entry_can_be_read_and_is_fused_unless_it_has_experts(name):
    facts = read_facts(MODELS[name], name)
    experts = any(layer.idle_parameters for layer in facts.layers)

    assert bool(facts.unfused) == experts
    assert facts.longest is not None


def test_names_are_found_as_the_hub_finds_them():
    assert published_config("qwen/qwen3-8b") == MODELS["Qwen/Qwen3-8B"]
    assert published_config("Qwen/Qwen3-8C") is None


def test_a_copy_has_the_sizes_of_its_model():
    assert published_config("unsloth/Qwen3-8B") == published_config("Qwen/Qwen3-8B") is not None
    assert published_config("unsloth/Meta-Llama-3.1-8B-Instruct") is not None
    assert published_config("unsloth/Qwen3-8B-bnb-4bit") is None, "its weights are held otherwise"
