"""What the fleet's side knows: one SAM template, its handlers, the registry that the factory asks, the local cloud."""
