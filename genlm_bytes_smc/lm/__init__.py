"""Token-level models: contexts, rows, the tree cache, adapters, and the bundled model."""
