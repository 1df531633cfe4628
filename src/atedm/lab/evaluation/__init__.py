"""Methods side by side: the same prompts drawn from the same noise, scored, and reported."""
