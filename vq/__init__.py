"""vq: write virtio device models in Python and run them."""
