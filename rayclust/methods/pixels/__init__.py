"""Methods that learn the representation itself, from the pixels; one paper a file."""
