"""One file per objective, each a pure function of tensors."""
