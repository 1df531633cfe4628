"""Charts of what the lab measures: costs, times, and figures over the steps of a run."""
