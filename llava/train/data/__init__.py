"""From record files to batches: records, images, samples, order, collation."""
