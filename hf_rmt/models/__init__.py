"""Where matrices live: models in memory, checkpoints on disk."""
