"""What the music is conditioned on: text, melody, style; and how that reaches the language model."""
