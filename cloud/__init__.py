"""What the fleet's side knows: one SAM template, its handlers, the registry, the local cloud."""
