"""One stage a file; the only folder that imports Ray."""
