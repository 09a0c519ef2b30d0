"""Vision: models that read pictures; a row for each kind, and native towers that make rows of pictures."""
