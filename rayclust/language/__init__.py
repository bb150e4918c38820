"""Names of clusters from words: vocabularies and votes."""
