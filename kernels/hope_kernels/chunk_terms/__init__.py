"""Terms of the tiles of a sequence: all that its keys, queries and gates do to any memory, and the triangular inverse they need."""
