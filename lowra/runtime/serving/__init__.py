"""Many adapters beside one base: a pool of them, mixed batches, and how they are combined."""
