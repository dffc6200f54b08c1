"""`fastsae compare`: FAST against block training at matched sparsity, with controls and intervals."""
