"""Training of hash functions: `python -m train.layerwise`."""
