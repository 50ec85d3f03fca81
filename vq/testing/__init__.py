"""What helps tests of code that uses vq."""
