"""Training of looped models: corpus, tokenizer, recipe, loop, export. `speed train` is its command."""
