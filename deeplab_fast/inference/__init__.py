"""Inference with folded batch norms and prepared weights."""
