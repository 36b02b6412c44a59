"""Messages as DataFrames: reading, decoding, filtering, and turning rows back into messages."""
