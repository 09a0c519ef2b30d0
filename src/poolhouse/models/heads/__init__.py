"""What stands behind a backbone: classifiers, rerankers, late interaction."""
