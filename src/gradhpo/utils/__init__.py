"""Tree maths, validation, logging: what the rest of the library stands on."""
