"""Training: three stages and end-to-end, by LoRA or in full, and the codec."""
