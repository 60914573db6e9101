"""Learns: from packed shards to model directories. Start at `training.loop.train`."""
