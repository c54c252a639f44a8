"""What whole models of configs cost: building them for it, counting, memory, published numbers."""
