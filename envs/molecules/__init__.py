"""Molecules. Ready-made rewards on SMILES or RDKit Mol objects."""
