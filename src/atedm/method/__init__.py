"""Methods: which tokens go on, and how the others are filled in again. Tensors only, no model library."""
