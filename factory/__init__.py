"""What happens to one unit: one module per step, the authority, records, drivers."""
