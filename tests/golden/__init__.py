"""Golden runs: small runs whose artefacts are known by digest, to show that a change of structure is only that."""
