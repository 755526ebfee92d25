"""Plain PyTorch, any dtype, slow: the specification of the operators, room by room. Nothing here is fast."""
