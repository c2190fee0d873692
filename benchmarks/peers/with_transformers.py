"""transformers + PEFT + bitsandbytes, as a careful user has them: sdpa attention, plain or with Liger's kernels.

Where there is a choice the faster one is taken: adapters in the type of the weights, no mask that causality does
without, batches on the device before the clock starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.peers.measure import measure_layouts
from benchmarks.peers.tables import RANK, Work
from benchmarks.shapes import device_and_dtype, projections


def load(work: Work, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with a fresh adapter, or with all of it trained, in training mode."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if work.options["liger"]:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel

        _apply_liger_kernel(work.config.get("model_type", "llama"))
    quantization = None
    if work.adapter == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        work.checkpoint,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": str(device)},
        attn_implementation="sdpa",
    )
    # transformers sees the boundaries of documents in position_ids only where there is no cache
    model.config.use_cache = False
    if work.options["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if work.adapter == "full":
        return model.train()
    torch.manual_seed(0)
    lora = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(projections(work.config)),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


def measure(work: Work) -> Iterator[dict[str, Any]]:
    """Rows of results, one for each layout."""
    device, dtype = device_and_dtype()
    yield from measure_layouts(load(work, device, dtype), work, device)
