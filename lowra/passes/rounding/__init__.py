"""How a weight becomes codes: moments of inputs, codebooks, error feedback, refinement."""
