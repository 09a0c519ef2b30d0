"""What stands behind a backbone: classifiers, rerankers, late interaction, BGE-M3."""
