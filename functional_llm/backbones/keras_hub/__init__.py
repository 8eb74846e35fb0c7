"""KerasHub's columns: how it describes the models of a family, kin in one module."""
