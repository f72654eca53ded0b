"""Which parties this process plays."""
