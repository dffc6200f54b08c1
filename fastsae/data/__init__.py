"""From chat datasets to shuffled activations: load, deduplicate, sequence, run the model, mix."""
