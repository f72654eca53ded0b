"""Split learning: one network, trained across parties that share neither data nor model."""
