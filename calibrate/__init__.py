"""Everything done off the line: training, normalization, thresholds, evaluation."""
