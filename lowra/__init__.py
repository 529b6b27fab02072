"""lowra: a compiler that makes language models small enough to fine-tune and serve anywhere."""

__version__ = "0.1.0"
