"""Where the unit's private key can live: one module per place."""
