"""Methods timed in turns in one run, because times of different runs do not compare."""
