"""Measures a model on shards that it was not trained on."""
