"""Many prompts in, answers out, in files: `phi2 generate --prompts`, and the pairs of `phi2 sample_pairs`."""
