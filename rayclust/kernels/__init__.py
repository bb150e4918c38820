"""Fused passes over memory, each beside its plain torch twin. A compiler is used where there is one, never needed."""
