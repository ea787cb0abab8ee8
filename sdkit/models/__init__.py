"""Models, tokenizers and adapters: loading them and reading their weights."""
