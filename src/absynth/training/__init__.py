"""Training: one function a model, frozen configuration in, module out, resumable."""
