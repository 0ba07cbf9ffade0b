"""From a `Frame` to an `Inspection`: preprocessing, EfficientAD, anomaly map, score and regions."""
