"""From rows in files to batches of tokens: sources, formats, rendering, the tokenised table, packing."""
