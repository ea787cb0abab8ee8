"""sdkit: self-distillation and on-policy distillation of language models, as data."""

__version__ = "0.1.0"
