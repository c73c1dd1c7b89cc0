"""The language model: codebook patterns, the transformer, sampling, and the decoder that runs many requests."""
