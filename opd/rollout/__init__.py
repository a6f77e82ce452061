"""How the student writes: decoding, and the guard against repetition loops."""
