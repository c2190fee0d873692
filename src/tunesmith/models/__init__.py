"""Models from Hugging Face with their computation replaced: loading, attention, adapters, the head."""
