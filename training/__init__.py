"""Training of the built-in model ``builtin:tiny-flux`` from procedurally drawn scenes."""
