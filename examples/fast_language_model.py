"""A script as one writes it for Unsloth and TRL, with `tunesmith` in its two import lines.

Run it from the repository: `.venv/bin/python examples/fast_language_model.py`. It fetches SmolLM2-135M from the hub;
a local folder does as well. On a CPU its 60 steps take minutes, on a GPU seconds.
"""

import torch
from datasets import load_dataset
from transformers import TrainingArguments

from tunesmith import FastLanguageModel, SFTTrainer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DATA = "examples/data/gsm8k.jsonl"
max_seq_length = 1024

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=MODEL,
    max_seq_length=max_seq_length,
    dtype=None,
    load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)


def as_text(rows):
    """The columns of a batch as one text each."""
    pairs = zip(rows["question"], rows["answer"], strict=True)
    return {"text": [f"### Question:\n{question}\n\n### Answer:\n{answer}" for question, answer in pairs]}


dataset = load_dataset("json", data_files=DATA, split="train").map(as_text, batched=True)

trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=dataset,
    dataset_text_field="text",
    max_seq_length=max_seq_length,
    dataset_num_proc=2,
    packing=False,
    args=TrainingArguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=5,
        max_steps=60,
        learning_rate=2e-4,
        fp16=not torch.cuda.is_bf16_supported(),
        bf16=torch.cuda.is_bf16_supported(),
        logging_steps=1,
        output_dir="runs/fast-language-model",
    ),
)

if __name__ == "__main__":
    trainer.train()
    model.save_pretrained("runs/fast-language-model/adapter")
    print(f"GPU memory at the peak: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
