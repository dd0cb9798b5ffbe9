"""The application: train, check and sample the embedding MLP of the makemore notebooks."""
