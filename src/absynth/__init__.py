"""Image classifiers that explain what they see: analysis by synthesis (ABS), its attacks and its certificates."""

__version__ = "0.1.0"
