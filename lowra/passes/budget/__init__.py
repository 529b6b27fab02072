"""Who gets how many bits and which rank: knapsacks, their relaxation, pins, what a plan stores."""
