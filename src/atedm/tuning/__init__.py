"""Find the plan for a model: what it may cost, what is tried, how far its images are from dense ones."""
