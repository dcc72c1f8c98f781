"""From shards to batches: order, reading, text, images, collation, streams."""
