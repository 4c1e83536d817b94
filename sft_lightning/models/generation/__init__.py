"""Generate answers: decoding modes, generation on sharded models, and checkpoints that answer prompts."""
