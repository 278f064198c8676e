"""What gets which precision (policy) and how it is packed (schemes)."""
