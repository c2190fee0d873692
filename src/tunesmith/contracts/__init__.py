"""The words that layers share: batches, errors and run events. Nothing here computes."""
