"""Images in, tokens out."""
