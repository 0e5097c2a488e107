"""The thin Flower bundle."""
