"""What settings and optimizers of other training tools are called here, for who brings a file along. Torch-free."""

from __future__ import annotations

SETTINGS: dict[str, str] = {
    "base_model": "model.name",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "load_in_4bit": "model.quantize",
    "load_in_8bit": "model.quantize",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "attn_implementation": "model.attention",
    "flash_attention": "model.attention",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "datasets": "data.train",
    "dataset": "data.train",
    "train_file": "data.train",
    "test_datasets": "data.eval",
    "val_set_size": "data.eval",
    "chat_template": "data.template",
    "train_on_inputs": "data.train_on",
    "roles_to_train": "data.train_on",
    "max_length": "train.sequence_length",
    "max_seq_length": "train.sequence_length",
    "sequence_len": "train.sequence_length",
    "cutoff_len": "train.sequence_length",
    "sample_packing": "train.packing",
    "batch_size": "train.global_batch",
    "train_batch_size": "train.global_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "micro_batch_size": "train.micro_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.scheduler",
    "lr_scheduler_type": "train.scheduler",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "optim": "train.optimizer",
    "adam_beta1": "train.betas",
    "adam_beta2": "train.betas",
    "gradient_clipping": "train.max_grad_norm",
    "gradient_checkpointing": "memory.policy",
    "activation_offloading": "memory.policy",
    "output_dir": "output.dir",
    "save_steps": "output.save_every",
    "save_total_limit": "output.keep",
    "eval_steps": "output.eval_every",
    "evals_per_epoch": "output.eval_every",
    "report_to": "output.track",
    "wandb_project": "output.project",
    "resume_from_checkpoint": "output.resume",
}
"""Names in lower case, and the settings that say the same or decide the same."""

REMARKS: dict[str, str] = {
    "gradient_accumulation_steps": "it counts the rows of all micro-batches of a step",
    "load_in_4bit": "nf4",
    "load_in_8bit": "int8",
}
"""What the name of the setting does not say."""

OPTIMIZERS: dict[str, str] = {
    "adam": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
}
"""Values of `train.optimizer`."""


def named_here(name: str) -> str | None:
    """What a setting of another tool is called here; None where that is not known."""
    here = SETTINGS.get(name.lower())
    remark = REMARKS.get(name.lower())
    return f"{here} ({remark})" if here is not None and remark is not None else here
