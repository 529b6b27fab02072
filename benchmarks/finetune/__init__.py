"""Fine-tuning: what each base reaches under the same training, and what a step takes in memory."""
