"""Run files, one per domain, reward and algorithm; an installed rayft holds this folder as ``rayft.configs``."""
