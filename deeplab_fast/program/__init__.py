"""What networks run by: folded and prepared for inference, in segments for training."""
