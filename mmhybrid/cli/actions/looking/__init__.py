"""From weights and pictures to what a model sees in them and what it gets wrong."""
